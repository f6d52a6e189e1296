"""What is called by its path: the merger's script, and the stage scripts in `train/`."""
