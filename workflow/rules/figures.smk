"""From tables to figures. One rule a figure, because a caption of the report takes no wildcards."""

for figure in FIGURES:

    # Draw one figure from the tables alone.
    rule:
        name:
            f"draw_{figure}"
        input:
            tables=expand(f"{RESULTS}/tables/{{table}}.csv", table=["engine"] if figure == "engine" else TABLES),
            modules=modules("eesd/analysis"),
        output:
            f"figures/{figure}.pdf",
            f"figures/{figure}.png",
            report(
                f"figures/{figure}.svg",
                caption=f"../report/{figure}.rst",
                category=question(figure),
                subcategory="Figures",
                labels={"figure": figure.replace("_", " ")},
            ),
        log:
            f"logs/figures/{figure}.log",
        params:
            figure=figure,
            tables=lambda wildcards, input: Path(input.tables[0]).parent,
            out=lambda wildcards, output: Path(output[0]).with_suffix(""),
        shell:
            "python -m eesd figure {params.figure} --tables {params.tables:q} --out {params.out} 2>&1 | tee {log}"
