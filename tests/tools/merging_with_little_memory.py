"""Child of test_merge_classic: merges a folder and prints by how many bytes its peak memory grew."""

import resource
import sys
from pathlib import Path

import torch

from verl.model_merger.classic import merge_classic
from verl.models.loading import quiet_transformers


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    small, large, target = map(Path, sys.argv[1:])
    quiet_transformers()
    torch.set_num_threads(1)
    # What is imported and built on the way counts as being there before.
    merge_classic(small, target / "small", small / "huggingface")
    before = peak()
    merge_classic(large, target / "large", large / "huggingface", dtype=torch.float32, file_size=20 * 10**6)
    print(peak() - before)
