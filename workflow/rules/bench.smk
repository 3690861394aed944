"""Measurements: one job decodes all prompts of one (model, task, group) with every method of the group, another times
the pieces of decoding.

Timed rules run alone: they claim all cores, and `timed=1`, of which the profile has one.
"""


# Decode each prompt with all methods back to back; an interrupted run continues from its .part file.
rule bench_group:
    input:
        model="resources/models/{model}",
        heads=lambda wildcards: head_files(wildcards.model, [wildcards.group], "head.safetensors"),
        cards=lambda wildcards: head_files(wildcards.model, [wildcards.group], "card.json"),
        others=lambda wildcards: settings.method_files(config, wildcards.model, wildcards.group),
        data=lambda wildcards: settings.data_inputs(config, [wildcards.task]),
        modules=modules(
            *[
                f"eesd/bench/{name}.py"
                for name in (
                    "runner",
                    "records",
                    "methods",
                    "compare",
                    "peers",
                    "load",
                    "memory",
                )
            ],
            "eesd/decoding",
            "eesd/cost_file.py",
            "eesd/facts.py",
            "eesd/ngrams.py",
            "eesd/words.py",
            *[f"eesd/control/{name}.py" for name in ("base", "calibration", "costs")],
            "eesd/models",
        ),
        task_modules=lambda wildcards: task_modules([wildcards.task]),
        method_modules=lambda wildcards: method_modules(wildcards.group),
    output:
        "results/bench/{model}/{task}/{group}.jsonl",
    log:
        "logs/bench/{model}/{task}/{group}.log",
    threads: workflow.cores
    resources:
        timed=1,
        gpu=1,
    params:
        settings=to_json(lambda config, wildcards: settings.resolve_bench(config, *wildcards)),
    shell:
        "python -m eesd bench --model {input.model} --settings {params.settings:q} --out {output} 2>&1 | tee {log}"


# Time every piece of decoding alone: what explains the speedups, and what replay takes for the cost of a token.
rule measure_hardware:
    input:
        model="resources/models/{model}",
        modules=modules(
            *[f"eesd/bench/{name}.py" for name in ("hardware", "rounds", "load")],
            # Not every controller: what one decides in microseconds is no reason to measure all costs again.
            *[f"eesd/control/{name}.py" for name in ("base", "calibration", "costs", "static")],
            "eesd/decoding",
            "eesd/drafting/exit_head.py",
            "eesd/models",
        ),
    output:
        "resources/hardware/{model}.json",
    log:
        "logs/hardware/{model}.log",
    threads: workflow.cores
    resources:
        timed=1,
        gpu=1,
    params:
        exit_layer=config["hardware"]["exit_layer"],
        draft_rows=config["hardware"]["draft_rows"],
        contexts=",".join(map(str, config["hardware"]["contexts"])),
        rounds=config["hardware"]["rounds"],
    shell:
        "python -m eesd hardware --model {input.model} --out {output} --exit-layer {params.exit_layer}"
        " --draft-rows {params.draft_rows}"
        " --contexts {params.contexts} --rounds {params.rounds} 2>&1 | tee {log}"
