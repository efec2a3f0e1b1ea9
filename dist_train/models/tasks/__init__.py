"""What a net is trained for: its loss and its metrics."""
