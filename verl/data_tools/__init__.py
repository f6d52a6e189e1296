"""From an API key and some prompts to data that trains: each tool is `python -m verl.data_tools.NAME`."""
