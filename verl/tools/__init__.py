"""Command-line tools beside training, each run as `python -m verl.tools.NAME`."""
