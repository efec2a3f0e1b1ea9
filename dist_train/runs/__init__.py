"""The run directory: reading and writing everything that a run leaves on disk except its checkpoints."""
