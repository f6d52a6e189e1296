"""What every test runs under."""

import os
import sys
import tempfile

import absl.logging

# Tiny tensors gain nothing from a second thread, and processes that each start one per core stand in each other's way.
# Set before torch is loaded; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Rows that tests read are not kept at the user's.
os.environ.setdefault("VERL_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"verl-tests-{os.getuid()}"))

# Hydra ends every log handler there is, and absl's then closes the stream it was made with unless that is sys.stderr of
# the moment: pytest's own, under which all further tests would fail.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__
