"""The reward of the benchmark's GRPO, as upstream verl calls it: by its file, with the answer's text.

It stands alone: what loads it has another package named `verl`, without ours beside it.
"""

import re

# The tokenizer's words are " w0", " w1", ..., each one token whose id is even where its number is (`inputs.py`).
WORD = re.compile(r" w(\d+)")


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    """The share of even words among an answer's; its few single letters, 256 tokens of the vocabulary, do not count."""
    numbers = WORD.findall(solution_str)
    return sum(int(number) % 2 == 0 for number in numbers) / max(1, len(numbers))
