"""Settings of generation."""

from typing import Literal

from verl.config.base import Count, Fraction, NonNegative, Positive, PositiveFloat, settings


@settings
class SamplingConfig:
    """The way in which answers are drawn. `do_sample=False` is greedy; `top_k=-1` and `top_p=1` switch the cuts off."""

    n: Positive
    do_sample: bool
    temperature: NonNegative
    top_p: Fraction
    top_k: int


@settings
class RolloutConfig:
    """The generation engine. Settings that only vLLM has a use for are named so in the YAML."""

    name: str
    n: Positive
    do_sample: bool
    temperature: NonNegative
    top_p: Fraction
    top_k: int
    prompt_length: Positive
    response_length: Positive
    seed: Count
    max_model_len: Positive | None
    max_num_seqs: Positive
    sync_check_prompts: Count
    sync_check_tolerance: PositiveFloat
    log_prob_use_dynamic_bsz: bool
    log_prob_max_token_len_per_gpu: Positive
    log_prob_micro_batch_size_per_gpu: Positive | None
    val_kwargs: SamplingConfig
    n_gpus_per_node: Count
    tensor_model_parallel_size: Positive
    gpu_memory_utilization: Fraction
    max_num_batched_tokens: Positive
    kv_cache_dtype: Literal["auto", "fp8"]
    enforce_eager: bool
    free_cache_engine: bool
    enable_chunked_prefill: bool
    disable_log_stats: bool
    dtype: Literal["float32", "bfloat16"]

    @property
    def sampling(self) -> SamplingConfig:
        """The way in which training answers are drawn."""
        return SamplingConfig(self.n, self.do_sample, self.temperature, self.top_p, self.top_k)

    @property
    def drops_weights(self) -> bool:
        """Whether the engine's `sleep` drops its weights, so that every use of it has to begin with a push."""
        return self.name == "vllm" and self.free_cache_engine
