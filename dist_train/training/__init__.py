"""Training: one start of a run from its configuration to its result; the loop is in trainer.py."""
