"""What Git LFS leaves in the place of a file that it has not fetched."""

# How such a file begins.
LFS_POINTER = b"version https://git-lfs"
