"""The run directory: everything a run leaves on the disk besides its checkpoints, written and read."""
