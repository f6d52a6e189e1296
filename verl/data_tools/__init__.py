"""Tools that make, check and look at data before training, each run as `python -m verl.data_tools.NAME`."""
