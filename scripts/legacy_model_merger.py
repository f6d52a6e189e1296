"""Merge a checkpoint's actor or critic folder into a Hugging Face folder.

python scripts/legacy_model_merger.py merge --backend fsdp --local_dir CKPT/actor --target_dir OUT
"""

from verl.model_merger.cli import main

if __name__ == "__main__":
    main()
