"""This process among its ranks: who it is, its device, collectives, signals, random numbers."""
