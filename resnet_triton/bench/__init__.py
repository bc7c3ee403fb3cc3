"""The benchmark suite: what is timed, against what, and how the results are kept, compared and shown."""
