rule measure_drift:
    input:
        model=lambda wildcards: plan.model_input(wildcards.base),
        structure=rules.inspect_model.output[0],
        windows=rules.prepare_calibration.output[0],
    output:
        "<results>/{base}drift.json",
    log:
        "<logs>/{base}measure_drift.log",
    benchmark:
        "<benchmarks>/{base}measure_drift.tsv"
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("drift")
    resources:
        **plan.resources("drift"),
    params:
        walk=plan.pruning(),
        model=lambda wildcards: plan.model_digest(WEIGHTS, base=wildcards.base),
        device=config["device"],
        code=plan.code("drift"),
    message:
        "Measuring how far each block moves the predicted token"
    script:
        "../../scripts/measure_drift.py"


rule learn_dictionary:
    input:
        **of_unit,
        drift=lambda wildcards: plan.drift_of(wildcards.variant),
        allocation=lambda wildcards: plan.allocation_of(wildcards.variant),
        warm=lambda wildcards: plan.warm_factors_of(wildcards.variant, wildcards.unit),
    output:
        factors="<results>/{variant}/factors/{unit}.safetensors",
        diagnostics="<results>/{variant}/factors/{unit}.json",
    log:
        "<logs>/learn_dictionary/{variant}/{unit}.log",
    benchmark:
        "<benchmarks>/learn_dictionary/{variant}/{unit}.tsv"
    wildcard_constraints:
        variant=one_of([variant for variant in plan.factorized if not plan.learns_in_turn(variant)]),
    priority: plan.priority("learn")
    group:
        plan.group("learn")
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("learn")
    resources:
        **plan.resources("learn"),
        in_turn=1,  # of those that share a SLURM job (profiles/slurm)
    params:
        layers=lambda wildcards: layers_of(wildcards.unit),
        variant=lambda wildcards: plan.learning(wildcards.variant),
        collection=plan.collection(),
        model=lambda wildcards: plan.model_digest(WEIGHTS, base=plan.base_of(wildcards.variant)),
        device=config["device"],
        code=plan.code("learn"),
    message:
        "Learning {wildcards.variant}, {wildcards.unit}"
    script:
        "../../scripts/learn_dictionary.py"


# The same, a unit after the other: each goes on from the hidden states that the one before it left.
rule learn_in_turn:
    input:
        **of_unit,
        drift=[],
        allocation=lambda wildcards: plan.allocation_of(wildcards.variant),
        warm=lambda wildcards: plan.warm_factors_of(wildcards.variant, wildcards.unit),
        streams=lambda wildcards: plan.streams_before(wildcards.variant, wildcards.unit),
        more=lambda wildcards: plan.more_windows_of(wildcards.variant, "compensate"),
    output:
        factors="<results>/{variant}/factors/{unit}.safetensors",
        diagnostics="<results>/{variant}/factors/{unit}.json",
        streams=temp("<results>/{variant}/streams/{unit}.h5"),
    log:
        "<logs>/learn_in_turn/{variant}/{unit}.log",
    benchmark:
        "<benchmarks>/learn_in_turn/{variant}/{unit}.tsv"
    wildcard_constraints:
        variant=one_of([variant for variant in plan.variants if plan.learns_in_turn(variant)]),
    priority: plan.priority("in_turn")
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("in_turn")
    resources:
        **plan.resources("in_turn"),
    params:
        layers=lambda wildcards: layers_of(wildcards.unit),
        variant=lambda wildcards: plan.learning(wildcards.variant, rounded=True),
        collection=plan.collection(),
        model=lambda wildcards: plan.model_digest(WEIGHTS, base=plan.base_of(wildcards.variant)),
        device=config["device"],
        code=plan.code("in_turn"),
    message:
        "Learning {wildcards.variant}, {wildcards.unit}, on what is before it"
    script:
        "../../scripts/learn_dictionary.py"
