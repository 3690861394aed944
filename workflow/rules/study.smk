"""Studies: heads trained with settings varied (rule train_head), one table and figure for each entry of `studies`."""


# Tabulate what the heads of a study learnt.
rule tabulate_study:
    input:
        cards=lambda wildcards: settings.study_cards(config, wildcards.model, wildcards.study),
        modules=modules(*[f"eesd/analysis/{name}.py" for name in ("study", "cards", "columns")]),
    output:
        report(
            "results/studies/{model}/{study}/heads.csv",
            caption="../report/heads.rst",
            category=question("study"),
            subcategory="Studies",
            labels={"table": "{study}, {model}"},
        ),
    log:
        "logs/studies/{model}/{study}.log",
    params:
        settings=to_json(lambda config, wildcards: settings.resolve_study(config, wildcards.study)),
    shell:
        "python -m eesd study --settings {params.settings:q} --out {output} {input.cards:q} 2>&1 | tee {log}"


# Draw agreement against what was varied, from the table of the study alone.
rule draw_study:
    input:
        table=f"{RESULTS}/studies/{{model}}/{{study}}/heads.csv",
        modules=modules("eesd/analysis"),
    output:
        "figures/{model}/studies/{study}.pdf",
        "figures/{model}/studies/{study}.png",
        report(
            "figures/{model}/studies/{study}.svg",
            caption="../report/study.rst",
            category=question("study"),
            subcategory="Studies",
            labels={"figure": "{study}, {model}"},
        ),
    log:
        "logs/figures/{model}/studies/{study}.log",
    params:
        tables=lambda wildcards, input: Path(input.table).parent,
        out=lambda wildcards, output: Path(output[0]).with_suffix(""),
    shell:
        "python -m eesd figure study --tables {params.tables:q} --out {params.out} 2>&1 | tee {log}"
