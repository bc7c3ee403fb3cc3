"""Mutation testing of `kernels/`: plant one small fault at a time and see whether a test notices.

    make mutate                                   # every function, about half an hour
    make mutate ARGS="max_pool.py conv_box.py"    # these files
    make mutate ARGS="--changed main --limit 80"  # what differs from a revision, at most 80 faults

`faults` makes the mutants from the syntax tree, `hosts` puts one into a forked process and runs the tests that `suites`
names for its file, `ledger` knows the mutants that no test can notice, and why. A mutant that survives everything in
Triton's interpreter is put into a copy of the package and judged by the tests that read machine code.
"""
