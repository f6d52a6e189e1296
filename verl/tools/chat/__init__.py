"""Talk to a student in the terminal, `verl chat` or `python -m verl.tools.chat`."""
