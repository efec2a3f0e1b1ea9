"""One process among its ranks: environment, device, collectives, signals and random numbers."""
