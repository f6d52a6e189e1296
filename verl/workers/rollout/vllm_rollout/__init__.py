"""vLLM inside the trainer's processes. Importing this package sets the environment that vLLM reads."""

import os

# The engine lives in the rank's own process: it joins the process group there, and weights are copied within the GPU.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# FlashInfer's sampler has a generator of its own and cannot give log-probs.
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
# Ranks that share an engine sum through NCCL alone: Ray shows each process its own GPU only. FlashInfer's way is the
# default of later versions (0.32).
os.environ["VLLM_ALLREDUCE_USE_SYMM_MEM"] = "0"
os.environ["VLLM_ALLREDUCE_USE_FLASHINFER"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
