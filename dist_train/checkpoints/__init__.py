"""Checkpoints: their content, how they are written, and which of them are good."""
