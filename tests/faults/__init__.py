"""Fault injection tests: kills, damaged files, failing surroundings and mutated settings."""
