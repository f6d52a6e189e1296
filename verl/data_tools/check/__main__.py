"""`python -m verl.data_tools.check FILE --against FILE --model MODEL`."""

import sys

from verl.data_tools.check.command import main

sys.exit(main())
