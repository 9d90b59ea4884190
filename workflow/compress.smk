# A run that compresses a model: from the model and a text to packed models, their evaluation and a report.
from cospadi.outside import ALL, TOKENIZER, WEIGHTS
from cospadi.plan import layers_of, one_of


wildcard_constraints:
    variant=one_of(plan.variants),
    base=one_of(["", *plan.pruned_bases]),
    unit=r"layers?_[\d-]+",
    layer=r"\d+",
    first=r"\d+",
    last=r"\d+",


include: "rules/fetch.smk"
include: "rules/text.smk"
include: "rules/inspect.smk"
include: "rules/prepare.smk"
include: "rules/prune.smk"
include: "rules/collect.smk"
include: "rules/gram.smk"
include: "rules/gradients.smk"
include: "rules/head.smk"


# what every job of a unit reads
of_unit = {
    "model": lambda wildcards: plan.model_input(plan.base_of(wildcards.variant)),
    "structure": lambda wildcards: plan.structure_of(plan.base_of(wildcards.variant)),
    "windows": rules.prepare_calibration.output[0],
    "gram": lambda wildcards: plan.grams_of(wildcards.unit, plan.base_of(wildcards.variant)),
    "gradients": lambda wildcards: plan.gradients_of(wildcards.variant, wildcards.unit),
}


include: "rules/allocate.smk"
include: "rules/learn.smk"
include: "rules/distill.smk"
include: "rules/quantize.smk"
include: "rules/choose.smk"
include: "rules/assemble.smk"
include: "rules/export.smk"
include: "rules/evaluate.smk"
include: "rules/summarize.smk"


# what the report is of
reported = [*rules.summarize.output, *(rules.plot_distances.output if plan.pruned_bases else [])]


include: "rules/report.smk"


rule compress:
    input:
        expand(rules.assemble_model.output, variant=plan.variants),
        rules.evaluate_dense.output,
        expand(rules.evaluate_model.output, variant=plan.variants),
        rules.summarize.output,
        rules.report.output,
    localrule: True
    message:
        f"The compressed models are in {plan.place(plan.results)}"


# asked for by name where nothing is trained, it says what is missing
rule train:
    input:
        plan.trains_nothing,
    localrule: True
