"""What code written for verl asks for and the trainer does not need.

    table.py    what a DataProto can do beside what the trainer needs of it
    plain.py    any value as one that loads without running code, for tables on disk
    futures.py  results that are still being computed
    workers.py  calls of a worker group's method by its name

Each name is importable from where verl has it, under a comment that says so; nobody imports from here otherwise. This
package imports nothing else of the project. Names that need the working parts of a module (the older call form of a
loss, a variance under a mask), and short ones beside them, have stayed in that module under a heading of their own;
verl's dispatch modes are in `verl.single_controller.base.verl_modes` for the same reason.
"""
