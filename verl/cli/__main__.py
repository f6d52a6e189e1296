"""`python -m verl.cli COMMAND ...`, where the console command is not installed."""

import sys

from verl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
