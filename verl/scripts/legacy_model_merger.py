"""Merge a checkpoint's actor or critic folder into a Hugging Face folder.

python scripts/legacy_model_merger.py merge --backend fsdp --local_dir CKPT/actor --target_dir OUT
"""

import sys
from pathlib import Path

# From a checkout without an install too, as the stage scripts run; `scripts/legacy_model_merger.py` is a link to this.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from verl.model_merger.cli import main

if __name__ == "__main__":
    main()
