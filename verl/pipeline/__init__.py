"""One command for all stages: `python -m verl.pipeline`.

flags --options--> settings of each stage --settings--> looked at --preflight--> stages in processes --stages-->
merged, judged, reported --results--> which student is closest --summary
"""

from verl.pipeline.command import main

__all__ = ["main"]
