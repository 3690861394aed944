"""From rows to evidence: checked rows, statistics, tables, figures and provenance.

Everything here reads files and never imports torch, so tables and figures redraw in seconds on any machine:

    rows.py        read row files, field by field          checks.py   what rows must agree on with each other
    stats.py       paired bootstrap of speedups            tables.py   rows and head cards -> results/tables/*.csv
    columns.py     what each column of a table means       figures/    tables -> figures/NAME.{pdf,png,svg}
    style.py       the look of every figure                provenance.py  where and when the rows were measured
"""
