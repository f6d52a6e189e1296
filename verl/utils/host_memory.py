"""Host memory that tensors of a GPU are copied into and out of."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import torch

# Where the parts of a buffer begin: what any copy engine is content with.
ALIGNMENT = 512


def host_buffer(size: int, pinned: bool) -> torch.Tensor:
    """`size` bytes of host memory.

    PyTorch's allocator of pinned memory rounds up to a power of two, up to twice what is needed, and keeps what is
    freed. So the pages are taken from the system, large ones where it has them, by all threads, and registered with
    CUDA, which would take them one by one.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not every system has large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    buffer[:: mmap.PAGESIZE].zero_()
    if pinned:
        cudart = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(buffer.data_ptr(), size, 0))
        unregister = weakref.finalize(buffer, cudart.cudaHostUnregister, buffer.data_ptr())
        # At the end of the process CUDA may be gone before this runs, and takes the registration with it.
        unregister.atexit = False
    return buffer
