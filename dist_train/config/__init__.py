"""The settings of a run: their schema, where their values come from, and how a batch is divided."""
