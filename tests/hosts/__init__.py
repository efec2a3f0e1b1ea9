"""Several hosts on one machine, to be cut off and crashed."""
