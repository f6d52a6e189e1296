"""Any of the usual formats as a dataset that trains."""

from verl.data_tools.convert.command import main, parse

__all__ = ["main", "parse"]
