"""`python -m verl.data_tools.compare`."""

from verl.data_tools.compare.command import main

if __name__ == "__main__":
    main()
