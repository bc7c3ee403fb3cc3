"""A CUDA graph for each input shape, and whether the model is still the one that was captured."""
