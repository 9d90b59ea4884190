# All units of a variant at once: what is trained together waits for the last of them.
rule distill_factors:
    input:
        dense=plan.model_input(),
        model=lambda wildcards: plan.model_input(plan.base_of(wildcards.variant)),
        structure=lambda wildcards: plan.structure_of(plan.base_of(wildcards.variant)),
        windows=rules.prepare_calibration.output[0],
        more=lambda wildcards: plan.more_windows_of(wildcards.variant, "distill"),
        factors=lambda wildcards: expand(
            rules.learn_dictionary.output.factors,
            unit=plan.units(wildcards.variant),
            allow_missing=True,
        ),
    output:
        directory("<results>/{variant}/distilled"),
    log:
        "<logs>/distill_factors/{variant}.log",
    benchmark:
        "<benchmarks>/distill_factors/{variant}.tsv"
    wildcard_constraints:
        variant=one_of([variant for variant in plan.factorized if plan.distills(variant)]),
    priority: plan.priority("distill")
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("distill")
    resources:
        **plan.resources("distill"),
    params:
        layers=lambda wildcards: [layers_of(unit) for unit in plan.units(wildcards.variant)],
        variant=lambda wildcards: plan.storing(wildcards.variant),
        collection=plan.collection(),
        model=lambda wildcards: plan.model_digest(WEIGHTS, base=plan.base_of(wildcards.variant)),
        device=config["device"],
        code=plan.code("distill"),
    message:
        "Training the factors of {wildcards.variant} end to end"
    script:
        "../../scripts/distill_factors.py"
