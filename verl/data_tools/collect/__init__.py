"""The teacher's answers to prompts, through an OpenAI-compatible endpoint: `python -m verl.data_tools.collect`."""
