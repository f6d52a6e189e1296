"""`python -m verl.data_tools.compare --a FILE --b FILE`."""

import sys

from verl.data_tools.compare.command import main

if __name__ == "__main__":
    sys.exit(main())
