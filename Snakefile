from snakemake.utils import min_version

from cospadi.config import check_config
from cospadi.plan import Plan, code_digest, layers_of, modules_of, one_of
from cospadi.report import closing_message
from cospadi.report.training import training_message

min_version("9.27")


configfile: "config.yaml"


config = check_config(
    config,
    overrides=workflow.config_settings.overwrite_config,
    source=", ".join(map(str, workflow.configfiles)),
)
plan = Plan(config)


report: f"workflow/report/{'training' if config['training'] else 'workflow'}.rst"


pathvars:
    results=plan.results,
    logs=f"{plan.results}/logs",
    benchmarks=f"{plan.results}/benchmarks",


wildcard_constraints:
    variant=one_of(plan.variants),
    name=one_of(plan.models),
    base=one_of(["", *plan.pruned_bases]),
    unit=r"layers?_[\d-]+",
    layer=r"\d+",
    first=r"\d+",
    last=r"\d+",


include: "workflow/rules/fetch.smk"
include: "workflow/rules/inspect.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/prune.smk"
include: "workflow/rules/collect.smk"
include: "workflow/rules/gram.smk"
include: "workflow/rules/learn.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/assemble.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/report.smk"


# a run trains models from scratch, or compresses one
rule all:
    default_target: True
    input:
        [] if config["training"] else expand(rules.assemble_model.output, variant=plan.variants),
        [] if config["training"] else expand(rules.evaluate_model.output, name=plan.models),
        [] if config["training"] else rules.summarize.output,
        plan.trained(rules.train_model.output.model),
        rules.report.output,
    localrule: True
    message:
        "Everything is in {plan.results}"


# the models trained from scratch and their table, without the report
rule train:
    input:
        plan.trained(rules.train_model.output.model),
        lambda wildcards: plan.training_report(),
    localrule: True
    message:
        "The models are in {plan.results}/training"


onsuccess:
    if plan.has_written("summary.json"):
        print(closing_message(plan))
    if plan.has_written("training.json"):
        print(training_message(plan))
