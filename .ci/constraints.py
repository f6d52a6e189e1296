"""Prints the versions of this environment's packages that requirements.txt and extras of setup.py name, as constraints.

    .venv/bin/python .ci/constraints.py > constraints.txt                    with all extras but gpu installed
    .venv-vllm/bin/python .ci/constraints.py gpu test > constraints-gpu.txt  with these extras

Of vLLM's CPU build, the version is that of vLLM.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version


def main(extras: list[str]) -> None:
    """Print a line for each package; exits where one is not installed."""
    wanted = {}
    for line in requires("verl"):
        extra = re.search(r"""extra == ['"](\w+)['"]""", line)
        if extra is None or extra[1] in extras or (not extras and extra[1] != "gpu"):
            name = re.match(r"[\w.-]+", line)[0]
            wanted[re.sub(r"[-_.]+", "-", name).lower()] = name
    print(f"# Versions that are tested together{', on GPUs' if 'gpu' in extras else ''}. Made by .ci/constraints.py.")
    for name in sorted(wanted):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = version(f"{name}-cpu")
        # The build's own mark, as in 2.13.0+cpu, is that of an index.
        print(f"{name}=={found.partition('+')[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
