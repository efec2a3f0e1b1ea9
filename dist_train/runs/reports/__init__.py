"""Runs compared: tables, charts and a page of HTML."""
