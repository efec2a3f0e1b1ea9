"""`dist-train verify`: does a config keep the promises, on this machine? Real ranks, a few minutes, a table."""
