"""`dist-train bench`: this harness and what people would use instead, side by side in one run."""
