"""vllm-del: a model's own early layers draft for it, inside vLLM (`--speculative-config del`)."""

__version__ = "0.1.0"
