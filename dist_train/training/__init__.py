"""Training: one attempt of a run, from its configuration to its result. The loop is in trainer.py."""
