"""Common training loops, each as its own documentation shows it, on the same task."""
