"""Names of verl's that nothing here calls: the settings are in `verl.config`."""

from verl.config import *  # noqa: F403
from verl.config import __all__ as __all__
