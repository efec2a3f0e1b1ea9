"""Tools beside the training: verify, bench, doctor and simulate examine the product itself; lr-find; new."""
