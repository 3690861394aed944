"""Replay: drafts recorded once, controllers judged on them in seconds, one table and figure for each entry of `replays`."""

REPLAY = ["eesd/replay", "eesd/control", "eesd/ngrams.py", "eesd/cost_file.py", "eesd/words.py"]


# Record what a head would draft at every position of vanilla's outputs.
rule record_trace:
    input:
        model="resources/models/{model}",
        rows="results/bench/{model}/{task}/{group}.jsonl",
        head="results/heads/{model}/{head}/head.safetensors",
        card="results/heads/{model}/{head}/card.json",
        modules=modules(
            *[f"eesd/bench/{name}.py" for name in ("trace", "methods")],
            "eesd/replay/trace.py",
            "eesd/control/base.py",
            "eesd/decoding",
            "eesd/ngrams.py",
            "eesd/models",
        ),
        drafter_modules=lambda wildcards: modules(
            *code_files.drafter_files([settings.traced_method(config, wildcards.head)])
        ),
    output:
        "results/traces/{model}/{task}/{group}/{head}.safetensors",
    log:
        "logs/traces/{model}/{task}/{group}/{head}.log",
    threads: workflow.cores
    resources:
        gpu=1,
    params:
        settings=to_json(
            lambda config, wildcards: settings.resolve_trace(config, wildcards.model, wildcards.task, wildcards.head)
        ),
    shell:
        "python -m eesd trace --model {input.model} --rows {input.rows} --settings {params.settings:q} --out {output}"
        " 2>&1 | tee {log}"


# Replay every controller setting of an entry on all its traces.
rule replay_controllers:
    input:
        traces=lambda wildcards: settings.replay_traces(config, wildcards.model, wildcards.replay),
        costs=lambda wildcards: settings.replay_costs(config, wildcards.model, wildcards.replay),
        modules=modules(*REPLAY, *[f"eesd/analysis/{name}.py" for name in ("columns", "stats")]),
    output:
        report(
            "results/replay/{model}/{replay}/replay.csv",
            caption="../report/replay.rst",
            category=question("replay"),
            subcategory="Tables",
            labels={"table": "{replay}, {model}"},
        ),
    log:
        "logs/replay/{model}/{replay}.log",
    threads: workflow.cores
    params:
        settings=to_json(lambda config, wildcards: settings.resolve_replay(config, wildcards.replay)),
        costs=lambda wildcards, input: each("--costs", input.costs),
    shell:
        "python -m eesd replay --settings {params.settings:q} {params.costs:q} --workers {threads} --out {output}"
        " {input.traces:q} 2>&1 | tee {log}"


# Tabulate the draft lengths of an entry's controllers along one answer of each of its traces.
rule tabulate_strips:
    input:
        traces=lambda wildcards: settings.replay_traces(config, wildcards.model, wildcards.replay),
        costs=lambda wildcards: settings.replay_costs(config, wildcards.model, wildcards.replay)[0],
        modules=modules(*REPLAY, "eesd/analysis/columns.py"),
    output:
        report(
            "results/replay/{model}/{replay}/strips.csv",
            caption="../report/strips.rst",
            category=question("replay"),
            subcategory="Tables",
            labels={"table": "{replay}, {model}"},
        ),
    log:
        "logs/replay/{model}/{replay}.strips.log",
    params:
        settings=to_json(lambda config, wildcards: settings.resolve_replay(config, wildcards.replay)),
    shell:
        "python -m eesd strips --settings {params.settings:q} --costs {input.costs:q} --out {output}"
        " {input.traces:q} 2>&1 | tee {log}"


# Hold the cost table's predictions against a group's rows; fails where replay does not make their rounds.
rule predict_group:
    input:
        traces=lambda wildcards: settings.prediction_traces(config, wildcards.model, wildcards.group),
        rows=lambda wildcards: settings.group_rows(config, wildcards.model, wildcards.group),
        costs=lambda wildcards: settings.cost_path(wildcards.model),
        modules=modules(*REPLAY, *[f"eesd/analysis/{name}.py" for name in ("checks", "columns", "rows")]),
    output:
        report(
            "results/prediction/{model}/{group}/prediction.csv",
            caption="../report/prediction.rst",
            category=question("prediction"),
            subcategory="Tables",
            labels={"table": "prediction, {model}, {group}"},
        ),
    log:
        "logs/prediction/{model}/{group}.log",
    params:
        rows=lambda wildcards, input: each("--rows", input.rows),
    shell:
        "python -m eesd predict --costs {input.costs:q} {params.rows:q} --out {output} {input.traces:q}"
        " 2>&1 | tee {log}"


# Draw predicted against measured speed.
rule draw_prediction:
    input:
        table=f"{RESULTS}/prediction/{{model}}/{{group}}/prediction.csv",
        modules=modules("eesd/analysis"),
    output:
        "figures/{model}/prediction/{group}.pdf",
        "figures/{model}/prediction/{group}.png",
        report(
            "figures/{model}/prediction/{group}.svg",
            caption="../report/prediction.rst",
            category=question("prediction"),
            subcategory="Figures",
            labels={"figure": "prediction, {model}, {group}"},
        ),
    log:
        "logs/figures/{model}/prediction/{group}.log",
    params:
        tables=lambda wildcards, input: Path(input.table).parent,
        out=lambda wildcards, output: Path(output[0]).with_suffix(""),
    shell:
        "python -m eesd figure prediction --tables {params.tables:q} --out {params.out} 2>&1 | tee {log}"


for replay, entry in config["replays"].items():

    # Draw the figure of one entry from its table alone.
    rule:
        name:
            f"draw_replay_{replay}"
        input:
            table=f"{RESULTS}/replay/{{model}}/{replay}/{settings.replay_table(entry)}.csv",
            modules=modules("eesd/analysis"),
        output:
            f"figures/{{model}}/{replay}.pdf",
            f"figures/{{model}}/{replay}.png",
            report(
                f"figures/{{model}}/{replay}.svg",
                caption=f"../report/{entry['figure']}.rst",
                category=question("replay"),
                subcategory="Figures",
                labels={"figure": f"{replay}, {{model}}"},
            ),
        log:
            f"logs/figures/{{model}}/{replay}.log",
        params:
            figure=entry["figure"],
            tables=lambda wildcards, input: Path(input.table).parent,
            out=lambda wildcards, output: Path(output[0]).with_suffix(""),
        shell:
            "python -m eesd figure {params.figure} --tables {params.tables:q} --out {params.out} 2>&1 | tee {log}"
