"""Names that rows, tables and settings share. Imports nothing: tables and figures are made without torch."""

BASELINE = "vanilla"  # the method of every group that the others are compared with
INITS = ("last", "same", "lens")  # what an exit head starts from, if not from another head
PARTS = ("prefill", "draft", "verify", "control", "other")  # of a generation's seconds; together they are its total
