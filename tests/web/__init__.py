"""The page of runs: its pages, its guard, and what they do."""
