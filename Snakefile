from snakemake.utils import min_version

from cospadi.runs import kind_of, plan_run

min_version("9.27")


configfile: "config.yaml"


# a run compresses a model or trains models from scratch; from here on each kind goes its own way
kind = kind_of(config)
plan = plan_run(
    config,
    overrides=workflow.config_settings.overwrite_config,
    source=", ".join(map(str, workflow.configfiles)),
    files=workflow.configfiles,
)
config = plan.config


report: f"workflow/report/{kind.name}.rst"


pathvars:
    results=plan.results,
    logs=f"{plan.results}/logs",
    benchmarks=f"{plan.results}/benchmarks",


include: f"workflow/{kind.name}.smk"


rule all:
    default_target: True
    input:
        getattr(rules, kind.name).input,
    localrule: True
    message:
        "Everything is in {plan.results}"


onsuccess:
    if message := plan.closing_message():
        print(message)
