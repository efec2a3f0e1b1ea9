"""From a data set to batches on the device: splits, the sampler, loader workers."""
