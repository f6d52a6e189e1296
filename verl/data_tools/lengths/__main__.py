"""`python -m verl.data_tools.lengths --data FILE --model BASE`."""

import sys

from verl.data_tools.lengths.command import main

if __name__ == "__main__":
    sys.exit(main())
