"""`dist-train bench`: this harness and its alternatives, side by side in one run."""
