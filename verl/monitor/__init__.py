"""Is a run healthy? Rules that look at the trends of its metrics, live and offline.

reading (files) -> Run ---replay---+
trainer (live)  -> metrics --------+-> Watch, with Rules -> Alarms, from step to step -> verdict, figure
"""
