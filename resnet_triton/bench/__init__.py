"""The benchmark suite: what is timed, against what, and how the results are kept, compared and shown.

results, environment, child (a process) -> runner (phases of steps)
alternatives, check (of answers) -> worker -> race (whole models)
cases, baselines -> data, check -> layers; ceilings (of the device)
results -> report -> page, output (files), compare; everything -> command
"""
