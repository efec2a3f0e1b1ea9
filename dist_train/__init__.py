"""dist_train: exact, resumable data-parallel training. Importing this package imports no other module."""

__version__ = "0.1.0"
