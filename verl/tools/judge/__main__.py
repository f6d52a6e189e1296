"""`python -m verl.tools.judge --data FILE --student NAME=FOLDER --out DIR`."""

from verl.tools.judge.command import main

if __name__ == "__main__":
    main()
