"""The data pipeline from a data set to batches on the device: splits, sampler, loader workers."""
