"""Merging an FP8 checkpoint and a GGUF into one hybrid folder: what is written, writing it, checking it."""
