"""Settings of a trained or frozen model: where it comes from, how it is sharded, how it is optimised."""

from typing import Any, Literal

from verl.config.base import AtLeastMinusOne, BelowOne, Count, Finite, Fraction, Positive, PositiveFloat, settings


@settings
class ModelConfig:
    """A model folder (Hugging Face, a checkpoint's `actor` or `critic`, or a PEFT adapter's), how to run it, and the
    adapters that are trained in place of its weights, if `lora_rank` is above 0."""

    path: str
    tokenizer_path: str | None
    use_shm: bool
    trust_remote_code: bool
    enable_gradient_checkpointing: bool
    recompute_share: Fraction
    use_remove_padding: bool
    override_config: dict[str, Any]
    lora_rank: Count
    lora_alpha: Positive
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None
    use_dora: bool
    use_rslora: bool
    load_in_4bit: bool


@settings
class WrapPolicy:
    """What FSDP2 gathers at once: a decoder layer, or a whole model of fewer than `min_num_params` parameters."""

    min_num_params: Count


@settings
class FSDPConfig:
    """Sharding: one FSDP2 mesh over all ranks."""

    strategy: Literal["fsdp", "fsdp2"]
    fsdp_size: int
    param_offload: bool
    optimizer_offload: bool
    reshard_after_forward: bool
    wrap_policy: WrapPolicy
    sync_gradients_once: bool
    dtype: Literal["float32", "bfloat16"]
    use_torch_compile: bool


@settings
class OptimizerConfig:
    """AdamW and its learning-rate schedule. `lr_warmup_steps` of -1 means `lr_warmup_steps_ratio` of the total."""

    lr: Finite
    betas: tuple[BelowOne, BelowOne]
    eps: PositiveFloat
    weight_decay: Finite
    lr_scheduler_type: Literal["constant", "cosine", "wsd"]
    lr_warmup_steps: AtLeastMinusOne
    lr_warmup_steps_ratio: Fraction
    total_training_steps: Positive | Literal[-1] | None
    min_lr_ratio: Fraction
    num_cycles: PositiveFloat
