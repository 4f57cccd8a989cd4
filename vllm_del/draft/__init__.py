"""Drafting itself, the same for both of vLLM's runners: the early layers, the head, the round."""
