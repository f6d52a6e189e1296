"""The base of every settings class: a frozen dataclass whose field types are checked and whose unknown keys are
refused."""

from functools import partial
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

settings = partial(dataclass, frozen=True, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0)]
AtLeastMinusOne = Annotated[int, Field(ge=-1)]
Count = Annotated[int, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
