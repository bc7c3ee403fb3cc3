"""A CUDA graph for each input shape, and whether the model is still the one that was captured.

cuda_graph (the CUDA calls) -> replay (when a graph is captured, replayed and dropped)
replay -> function (compiled functions)
replay, fingerprint (what must not change), snapshot (`freeze=True`) -> runner (models)
"""
