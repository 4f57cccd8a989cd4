"""Everything that touches vLLM's internals: the ledger of patches, and the drafter of each runner."""
