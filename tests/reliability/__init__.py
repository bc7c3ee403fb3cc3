"""`make verify`: every gate in turn, each with a record, and `docs/reliability.md` made of the records.

`gates` says what there is to run, `run` runs it, `records` reads what was left behind, `report` and `tables` write it
down. Nothing in the report is typed but `untested.md`.
"""
