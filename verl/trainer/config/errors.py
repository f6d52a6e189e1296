"""The error for a configuration that cannot be used."""

from __future__ import annotations


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, in one message."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem(s) in the configuration:\n{lines}")
