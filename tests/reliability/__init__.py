"""How far the tests can be trusted: whether they notice faults, and every check in one command.

    make mutate                                   # every function, about half an hour
    make mutate ARGS="max_pool.py conv_box.py"    # these files
    make mutate ARGS="--changed main --limit 80"  # what differs from a revision, at most 80 faults
    make verify                                   # every gate, about an hour

`places` finds in a syntax tree where a fault is. `mutants` makes faults of the kinds that people make, `planted` is a
table of faults by hand. `planting` puts one in its place, `judge` runs tests against it in a forked process: those that
`suites` names for a mutant's file, the one that a planted fault names. `ledger` knows the mutants that no test can
notice, and why. `mutate` and `plant` are commands of their own.

`verify` runs every gate, one after another.
"""
