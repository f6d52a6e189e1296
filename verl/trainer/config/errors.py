"""The error for a configuration that cannot be used."""

from __future__ import annotations

from verl.config.run import Config


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, in one message.

    Attributes:
        problems: a sentence each.
        config: the settings, where each is right and they contradict each other.
    """

    def __init__(self, problems: list[str], config: Config | None = None):
        self.problems, self.config = problems, config
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem(s) in the configuration:\n{lines}")
