"""The settings of a run: schema, loading from YAML and overrides, default folders, and the division of a batch."""
