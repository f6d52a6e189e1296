"""`python -m verl.tools.score --critic DIR --data FILE`."""

from verl.tools.score.command import main

if __name__ == "__main__":
    main()
