"""`python -m verl.data_tools.convert FILE --out FILE`."""

import sys

from verl.data_tools.convert.command import main

sys.exit(main())
