"""Faults put in on purpose, and what becomes of the runs."""
