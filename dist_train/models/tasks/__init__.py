"""Training tasks: loss, metrics and confusion matrix."""
