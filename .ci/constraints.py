"""Prints the versions of this environment's packages that requirements.txt and some extras name, as constraints.

    .venv/bin/python .ci/constraints.py dev data examples wandb > constraints.txt
    .venv-vllm/bin/python .ci/constraints.py gpu > constraints-gpu.txt

Of vLLM's CPU build, the version is that of vLLM.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version


def main(extras: list[str]) -> None:
    """Print a line for each package; exits with an error where one is not installed."""
    names = set()
    for line in requires("verl"):
        extra = re.search(r"""extra == ['"](\w+)['"]""", line)
        if extra is None or extra[1] in extras:
            names.add(re.match(r"[\w.-]+", line)[0])
    print(f"# Versions that are tested together, with the extras {', '.join(extras)}. Made by .ci/constraints.py.")
    for name in sorted(names, key=str.lower):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = version(f"{name}-cpu")
        # The mark of a build, as in 2.13.0+cpu, is that of an index.
        print(f"{name}=={found.partition('+')[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
