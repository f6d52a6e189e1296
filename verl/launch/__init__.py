"""Ray on several machines for one run: started on each, waited for, and ended with the run. `docs/nodes.md`"""
