"""`python -m verl.data_tools.lengths`."""

from verl.data_tools.lengths.command import main

if __name__ == "__main__":
    main()
