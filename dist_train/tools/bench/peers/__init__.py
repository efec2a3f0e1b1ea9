"""The loops that people write: each as its own documents show it, on the same task."""
