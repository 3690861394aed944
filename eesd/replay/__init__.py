"""Replay: controllers judged on recorded drafts, exactly and thousands of times faster than decoding. No torch.

    trace.py      what would be drafted at every position of greedy outputs, as `eesd trace` records it
    loop.py       the rounds that a controller makes of a trace
    oracle.py     the least possible time
    table.py      rounds and a cost table -> results/replay/{model}/{replay}/replay.csv

In greedy decoding the output does not depend on the controller, and what is drafted depends on the accepted prefix
alone; so a trace holds all that any controller of chains can meet.
"""
