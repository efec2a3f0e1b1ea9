"""The page of runs in a browser: look at them, stop and resume them, compare them, take results away."""
