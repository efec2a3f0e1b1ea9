"""Checkpoints: what they hold, how they are written, and which of them is good."""
