"""Comparison of runs: tables, charts and an HTML page."""
