"""User code: import of objects by name, BK.Synapse bundles, and safe unpacking of zip archives."""
