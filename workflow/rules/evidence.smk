"""From rows to tables."""


# Compute every table from rows and head cards alone.
rule make_tables:
    input:
        rows=bench_files(),
        cards=card_files(),
        modules=modules("eesd/analysis"),
    output:
        [
            report(
                f"results/tables/{table}.csv",
                caption=f"../report/{table}.rst",
                category=question(table),
                subcategory="Tables",
                labels={"table": table.replace("_", " ")},
            )
            for table in TABLES
        ],
        "results/tables/speedup.md",
        "results/tables/speedup.tex",
    log:
        "logs/tables/tables.log",
    params:
        out=lambda wildcards, output: Path(output[0]).parent,
        cards=lambda wildcards, input: each("--cards", input.cards),
    shell:
        "python -m eesd tables --out {params.out} {params.cards:q} {input.rows:q} 2>&1 | tee {log}"


# Tabulate the measured costs of all models that run.
rule make_engine_table:
    input:
        costs=expand("resources/hardware/{model}.json", model=config["run"]["models"]),
        modules=modules(
            *[f"eesd/analysis/{name}.py" for name in ("engine", "columns")],
            "eesd/cost_file.py",
            "eesd/words.py",
        ),
    output:
        report(
            "results/tables/engine.csv",
            caption="../report/engine.rst",
            category=question("engine"),
            subcategory="Tables",
            labels={"table": "engine"},
        ),
    log:
        "logs/tables/engine.log",
    shell:
        "python -m eesd engine --out {output} {input.costs:q} 2>&1 | tee {log}"


# List the machine, versions, settings and wall time behind the rows.
rule collect_provenance:
    input:
        rows=bench_files(),
        modules=modules("eesd/analysis"),
    output:
        report(
            "results/tables/provenance.csv",
            caption="../report/provenance.rst",
            category=question("provenance"),
            subcategory="Tables",
            labels={"table": "provenance"},
        ),
    log:
        "logs/tables/provenance.log",
    params:
        rows=lambda wildcards, input: each("--rows", input.rows),
    shell:
        "python -m eesd provenance {params.rows:q} --out {output} 2>&1 | tee {log}"


# Write all rows as answer files of Spec-Bench; made on request only: `snakemake results/spec_bench`.
rule export_spec_bench:
    input:
        rows=bench_files(),
        modules=modules(*[f"eesd/analysis/{name}.py" for name in ("spec_bench", "rows", "checks")]),
    output:
        directory("results/spec_bench"),
    log:
        "logs/tables/spec_bench.log",
    shell:
        "python -m eesd spec-bench --out {output} {input.rows:q} 2>&1 | tee {log}"


# Fail if an output differs from vanilla's without the evidence of a tie; apart from the tables, so that they survive it.
rule check_lossless:
    input:
        tables=expand("results/tables/{table}.csv", table=["lossless", "divergences", "sampling"]),
        modules=modules("eesd/analysis/verdict.py"),
    output:
        "results/lossless.txt",
    log:
        "logs/tables/lossless.log",
    params:
        tables=lambda wildcards, input: Path(input.tables[0]).parent,
    shell:
        "python -m eesd lossless --tables {params.tables} --out {output} 2>&1 | tee {log}"


# Test sampled decoding of every drafter and controller against the exact law of a toy; `check_lossless` judges it.
rule certify_sampling:
    input:
        modules=modules(
            *[f"eesd/{part}" for part in ("certify", "control", "decoding", "drafting", "models", "ngrams.py")],
            *[f"eesd/analysis/{name}.py" for name in ("columns", "comparisons")],
        ),
    output:
        report(
            "results/tables/sampling.csv",
            caption="../report/sampling.rst",
            category=question("sampling"),
            subcategory="Tables",
            labels={"table": "sampling"},
        ),
    log:
        "logs/tables/sampling.log",
    shell:
        "python -m eesd certify --no-fail --out {output} 2>&1 | tee {log}"
