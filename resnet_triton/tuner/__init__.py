"""The tuner: find the fastest configuration of each of a model's convolutions on this GPU and write them to a table.

trial (one configuration, timed and checked), precompile (compilers in other processes) -> search (one shape)
-> tools/tune.py, the command
"""
