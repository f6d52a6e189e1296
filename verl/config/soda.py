"""Settings of SODA."""

from typing import Literal

from verl.config.base import NonNegative, PositiveFloat, settings


@settings
class SodaConfig:
    """DPO on pairs of the teacher's answer, chosen, and the student's own, rejected."""

    enable: bool
    beta: PositiveFloat
    resample: Literal["once", "epoch"]
    sft_coef: NonNegative
    length_normalized: bool
