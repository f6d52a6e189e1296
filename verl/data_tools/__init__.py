"""From prompts and an API key to a dataset that trains: tools, each run as `python -m verl.data_tools.NAME`."""
