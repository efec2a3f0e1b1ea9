"""The learning-rate range test of `dist-train lr-find`."""
