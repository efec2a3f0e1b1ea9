"""dist_train: exact, resumable data-parallel training. Importing it imports nothing else."""

__version__ = "0.1.0"
