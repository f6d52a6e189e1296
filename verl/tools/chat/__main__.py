"""`python -m verl.tools.chat MODEL`."""

import sys

from verl.tools.chat.command import main

if __name__ == "__main__":
    sys.exit(main())
