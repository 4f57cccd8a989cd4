"""Decides where drafts leave and how long they are. Pure torch; knows no vLLM."""
