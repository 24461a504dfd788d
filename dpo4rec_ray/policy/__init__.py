"""The LLM that is trained: its weights, its batches, its trainer, and a small one made from scratch."""
