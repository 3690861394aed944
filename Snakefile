# The EESD suite: from a model and prompts to tables, figures and a report.
#
#   snakemake --cores all                                     # config/config.yaml: needs no model hub
#   snakemake --cores all --configfile config/paper.yaml      # laid over it: dictionaries merge, lists replace
#   snakemake --report report.html                            # afterwards
from snakemake.utils import min_version

min_version("9.27")


configfile: f"{workflow.basedir}/config/config.yaml"


wildcard_constraints:
    wheel="[^/]+",
    model="[^/]+",
    corpus="[^/]+",
    head="[^/]+",
    skips="[^/]+",
    task="[^/]+",
    group="[^/]+",
    replay="[^/]+",
    study="[^/]+",


include: "workflow/rules/common.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/distill.smk"
include: "workflow/rules/bench.smk"
include: "workflow/rules/replay.smk"
include: "workflow/rules/study.smk"
include: "workflow/rules/evidence.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/viewer.smk"


# Files that the rules of run.rules make.
EXTRA = []
for rules_of_your_own in config["run"]["rules"]:

    include: Path(rules_of_your_own).absolute()


# What the lists under `run` of the configuration reach, down to tables and figures.
rule all:
    default_target: True
    input:
        expand("results/tables/{table}.csv", table=[*TABLES, "provenance", "engine", "sampling"]),
        ["results/tables/speedup.md", "results/tables/speedup.tex"],
        "results/lossless.txt",
        figure_files(),
        EXTRA,


# The figures alone; with `--config source=published` those of the published tables, without running a model.
rule figures:
    input:
        figure_files(),


# The studies of run.studies alone: what choices in training a head are worth.
rule studies:
    input:
        lambda wildcards: study_files(),


# Copy what was measured to published/, for everybody to redraw; README.md and docs/results.md show it.
rule publish:
    input:
        rules.all.input,
        published_files(),
    log:
        "logs/publish.log",
    params:
        project=workflow.basedir,
        out=PUBLISHED,
    shell:
        "(python -m eesd archive --out {params.out:q} {input:q} && cd {params.project:q} && python -m eesd readme)"
        " 2>&1 | tee {log:q}"


# The same with the studies alone.
use rule publish as publish_studies with:
    input:
        lambda wildcards: study_files(),
    log:
        "logs/publish_studies.log",


onsuccess:
    print("Tables: results/tables/*.csv   Figures: figures/   One page: snakemake --report report.html")


onerror:
    print("Stopped. The reason is above and in logs/. The same command continues where this one stopped.")
