"""The entry point vLLM calls in every process: makes the word `del` known, and does no more than that.

vLLM loads the `vllm.general_plugins` group in the API process, the engine core and every worker. What is
patched, where and why stands in `vllm_del.engine.patches`; nothing there acts before a user asks for `del`.
"""

from packaging.specifiers import SpecifierSet

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")


def register() -> None:
    """Apply the patches that let vLLM understand `del`. Idempotent."""
    from vllm import __version__ as vllm_version

    # An error here would stop vLLM for everyone, also for those who do not ask for `del`.
    if SUPPORTED_VLLM.contains(vllm_version, prereleases=True):
        try:
            from vllm_del.engine.patches import apply

            apply()
            return
        except Exception as error:
            # Of whatever kind: vLLM's own classes may say it when ours are made of them.
            reason = f"vllm-del does not fit vLLM {vllm_version}, which is installed ({type(error).__name__}: {error})"
    else:
        reason = f"vllm-del supports vLLM {SUPPORTED_VLLM}, but vLLM {vllm_version} is installed"
    # Nothing else of ours is imported: it may not fit this vLLM.
    from vllm_del.engine.command_line import apply_refusal

    apply_refusal(f"{reason}: install a supported vLLM, or start without the speculative method 'del'.")
