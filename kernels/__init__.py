"""Operations of a draft step, one folder each: `reference.py` is plain torch and defines the result.

Installed as `vllm_del.kernels`. Knows no vLLM.
"""
