"""What is learnt from the target's own outputs: heads, and the sublayers it can draft without."""

from eesd.published import PUBLISHED_HEADS

# All of eesd/distill but what publishes and takes heads.
TRAINING = [
    f"eesd/distill/{file.name}"
    for file in sorted(Path(workflow.basedir, "eesd/distill").glob("*.py"))
    if file.stem not in ("__init__", "published")
]


# Let the target answer training prompts, recording exit-layer states and teacher probabilities on the way.
rule generate_corpus:
    input:
        model="resources/models/{model}",
        data=lambda wildcards: settings.data_inputs(config, config["corpora"][wildcards.corpus]["tasks"]),
        modules=modules(
            "eesd/distill/corpus.py",
            "eesd/distill/record.py",
            "eesd/decoding/sampling.py",
            "eesd/models",
        ),
        task_modules=lambda wildcards: task_modules(config["corpora"][wildcards.corpus]["tasks"]),
    output:
        directory("results/corpus/{model}/{corpus}"),
    log:
        "logs/corpus/{model}/{corpus}.log",
    threads: workflow.cores
    resources:
        gpu=1,
    params:
        settings=to_json(lambda config, wildcards: settings.resolve_corpus(config, wildcards.corpus)),
    shell:
        "python -m eesd corpus --model {input.model} --settings {params.settings:q} --out {output} 2>&1 | tee {log}"


if config["run"]["heads"] == "published":

    # Use heads that come with the repository; others are still trained.
    rule take_head:
        input:
            model="resources/models/{model}",
            head=f"{PUBLISHED_HEADS}/{{model}}/{{head}}/head.safetensors",
            card=f"{PUBLISHED_HEADS}/{{model}}/{{head}}/card.json",
            modules=modules("eesd/distill/published.py"),
        output:
            head="results/heads/{model}/{head}/head.safetensors",
            card="results/heads/{model}/{head}/card.json",
        log:
            "logs/heads/{model}/{head}.log",
        params:
            source=lambda wildcards, input: Path(input.head).parent,
            out=lambda wildcards: settings.head_path(wildcards.model, wildcards.head),
        shell:
            "python -m eesd take --head {params.source:q} --model {input.model} --out {params.out} 2>&1 | tee {log}"

    ruleorder: take_head > train_head


# Distil one head from the corpus.
rule train_head:
    input:
        model="resources/models/{model}",
        corpus=lambda wildcards: f"results/corpus/{wildcards.model}/{config['heads'][wildcards.head]['corpus']}",
        origin=lambda wildcards: settings.head_origin(config, wildcards.model, wildcards.head),
        modules=modules(
            *TRAINING,
            "eesd/drafting/exit_head.py",
            "eesd/drafting/medusa.py",
            "eesd/drafting/stored.py",
            "eesd/drafting/vocabulary.py",
            "eesd/models",
        ),
    output:
        head="results/heads/{model}/{head}/head.safetensors",
        card="results/heads/{model}/{head}/card.json",
    log:
        "logs/heads/{model}/{head}.log",
    threads: workflow.cores
    resources:
        gpu=1,
    params:
        settings=to_json(lambda config, wildcards: settings.resolve_head(config, wildcards.head)),
        out=lambda wildcards: settings.head_path(wildcards.model, wildcards.head),
    shell:
        "python -m eesd train --model {input.model} --corpus {input.corpus}"
        " --settings {params.settings:q} --out {params.out} 2>&1 | tee {log}"


# Search the sublayers that the target drafts best without, priced by the measured costs.
rule search_skips:
    input:
        model="resources/models/{model}",
        costs="resources/hardware/{model}.json",
        data=lambda wildcards: settings.data_inputs(config, config["skips"][wildcards.skips]["tasks"]),
        modules=modules(
            "eesd/bench/skip_search.py",
            "eesd/cost_file.py",
            "eesd/drafting/self_sd.py",
            "eesd/decoding",
            "eesd/models",
        ),
        task_modules=lambda wildcards: task_modules(config["skips"][wildcards.skips]["tasks"]),
    output:
        "results/skips/{model}/{skips}.json",
    log:
        "logs/skips/{model}/{skips}.log",
    threads: workflow.cores
    resources:
        gpu=1,
    params:
        settings=to_json(lambda config, wildcards: settings.resolve_skips(config, wildcards.skips)),
    shell:
        "python -m eesd skips --model {input.model} --costs {input.costs}"
        " --settings {params.settings:q} --out {output} 2>&1 | tee {log}"
