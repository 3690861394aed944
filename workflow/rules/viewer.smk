"""The trace viewer: a few decodes recorded round by round, and one page to watch them in."""


# Decode some prompts with every method of a group, noting every draft, its probabilities and its seconds.
rule record_view:
    input:
        model="resources/models/{model}",
        files=lambda wildcards: settings.method_files(config, wildcards.model, wildcards.group),
        heads=lambda wildcards: head_files(wildcards.model, [wildcards.group], "head.safetensors"),
        cards=lambda wildcards: head_files(wildcards.model, [wildcards.group], "card.json"),
        data=lambda wildcards: settings.data_inputs(config, [wildcards.task]),
        modules=modules(
            *[f"eesd/bench/{name}.py" for name in ("view", "methods", "runner")],
            "eesd/cost_file.py",
            "eesd/decoding",
            "eesd/ngrams.py",
            *[f"eesd/control/{name}.py" for name in ("base", "calibration", "costs")],
            "eesd/models",
        ),
        task_modules=lambda wildcards: task_modules([wildcards.task]),
        method_modules=lambda wildcards: method_modules(wildcards.group),
    output:
        "results/views/{model}/{task}/{group}.jsonl",
    log:
        "logs/views/{model}/{task}/{group}.log",
    threads: workflow.cores
    resources:
        timed=1,
        gpu=1,
    params:
        settings=to_json(lambda config, wildcards: settings.resolve_view(config, *wildcards)),
    shell:
        "python -m eesd view --model {input.model} --settings {params.settings:q} --out {output} 2>&1 | tee {log}"


# One page without a network: choose a decode and watch it in real time beside vanilla's.
rule make_viewer:
    input:
        views=[file.replace("results", RESULTS, 1) for file in settings.view_files(config)],
        modules=modules("eesd/analysis"),
        parts=[f"{workflow.basedir}/eesd/analysis/viewer/{part}" for part in ("page.html", "style.css", "viewer.js")],
    output:
        report(
            "figures/viewer.html",
            caption="../report/viewer.rst",
            category=question("viewer"),
            subcategory="Figures",
            labels={"figure": "watch it decode"},
        ),
    log:
        "logs/figures/viewer.log",
    shell:
        "python -m eesd viewer --out {output} {input.views:q} 2>&1 | tee {log}"
