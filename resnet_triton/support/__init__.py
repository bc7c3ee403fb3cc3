"""Helpers that know nothing of kernels: files, processes, timing, the terminal, torchvision."""
