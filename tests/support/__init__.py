"""Shared test helpers: real ranks, processes, hosts and clusters, and readers of run files."""
