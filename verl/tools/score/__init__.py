"""The offline scorer, `python -m verl.tools.score`: how well any discriminator tells teacher and student apart."""
