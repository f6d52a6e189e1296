"""The console command `verl`: every other command of the project by a name below it.

`commands.py` has the names, `main.py` finds and starts what is meant, `other_verl.py` looks for a second package of the
same name, `completion.py` writes what a shell completes with.
"""
