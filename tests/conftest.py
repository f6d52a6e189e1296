"""What every test runs under."""

import os

# Tiny tensors gain nothing from a second thread, and processes that each start one per core stand in each other's way.
# Set before torch is loaded; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
