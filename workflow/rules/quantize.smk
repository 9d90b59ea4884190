rule quantize_codes:
    input:
        **of_unit,
        factors=rules.learn_dictionary.output.factors,
        distilled=lambda wildcards: plan.distilled_of(wildcards.variant),
    output:
        codes="<results>/{variant}/codes/{unit}.safetensors",
        diagnostics="<results>/{variant}/codes/{unit}.json",
    log:
        "<logs>/quantize_codes/{variant}/{unit}.log",
    benchmark:
        "<benchmarks>/quantize_codes/{variant}/{unit}.tsv"
    wildcard_constraints:
        variant=one_of(plan.factorized),
    group:
        plan.group("quantize")
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("quantize")
    resources:
        **plan.resources("quantize"),
        in_turn=1,  # of those that share a SLURM job (profiles/slurm)
    params:
        layers=lambda wildcards: layers_of(wildcards.unit),
        variant=lambda wildcards: plan.storing(wildcards.variant),
        collection=plan.collection(),
        model=lambda wildcards: plan.model_digest(WEIGHTS, base=plan.base_of(wildcards.variant)),
        code=plan.code("quantize"),
    message:
        "Packing {wildcards.variant}, {wildcards.unit}"
    script:
        "../../scripts/quantize_codes.py"
