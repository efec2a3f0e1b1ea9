"""`dist-train verify`: check with real ranks that a config keeps the promises on this machine, in a few minutes."""
