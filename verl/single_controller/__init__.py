"""One driver process calls methods of many worker processes as if they were one object.

`base` says what a worker is and how the arguments of a call are shared out among ranks; it knows nothing of Ray.
`ray` starts the processes and carries the calls.
"""

from verl import __version__
from verl.single_controller.base import ClassWithInitArgs, ResourcePool, Worker, WorkerGroup

__all__ = ["ClassWithInitArgs", "ResourcePool", "Worker", "WorkerGroup", "__version__"]
