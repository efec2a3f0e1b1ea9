"""One optimizer update: eager, compiled or as a CUDA graph."""
