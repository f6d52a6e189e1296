"""The quick start: three training stages on a tiny model, on a CPU, with an answer key."""
