"""A CUDA graph for each input shape, and whether the model is still the one that was captured.

cuda_graph (the CUDA calls) -> replay (when a graph is captured, replayed and dropped)
look (where tensors lie, and how) -> fingerprint (what must not change)
replay, look -> function (compiled functions)
replay, fingerprint, snapshot (`freeze=True`) -> runner (models)
"""
