"""`python -m verl.launch --head ... -- COMMAND`, or `--worker ADDRESS`."""

import sys

from verl.launch.command import main

if __name__ == "__main__":
    sys.exit(main())
