from cospadi.digests import files_digest
from cospadi.outside import untimed


# Which matrix gets how many bytes, for the variants that part them: measured unit by unit, decided once.
rule profile_matrices:
    input:
        **of_unit,
    output:
        "<results>/{variant}/profile/{unit}.json",
    log:
        "<logs>/profile_matrices/{variant}/{unit}.log",
    benchmark:
        "<benchmarks>/profile_matrices/{variant}/{unit}.tsv"
    priority: plan.priority("profile")
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("profile")
    resources:
        **plan.resources("profile"),
    params:
        layers=lambda wildcards: layers_of(wildcards.unit),
        variant=lambda wildcards: plan.learning(wildcards.variant),
        collection=plan.collection(),
        model=lambda wildcards: plan.model_digest(WEIGHTS, base=plan.base_of(wildcards.variant)),
        device=config["device"],
        code=plan.code("profile"),
    message:
        "Measuring what bytes are worth to {wildcards.variant}, {wildcards.unit}"
    script:
        "../../scripts/profile_matrices.py"


rule allocate_bytes:
    input:
        structure=lambda wildcards: plan.structure_of(plan.base_of(wildcards.variant)),
        windows=rules.prepare_calibration.output[0],
        profiles=lambda wildcards: plan.profiles_of(wildcards.variant),
        given=lambda wildcards: [untimed(file) for file in plan.allocation_file(wildcards.variant)],
    output:
        allocation="<results>/{variant}/allocation.json",
        table="<results>/{variant}/allocation.tsv",
    log:
        "<logs>/allocate_bytes/{variant}.log",
    benchmark:
        "<benchmarks>/allocate_bytes/{variant}.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        **plan.resources("allocate"),
    params:
        given=lambda wildcards: files_digest(plan.allocation_file(wildcards.variant)),
        units=lambda wildcards: {unit: layers_of(unit) for unit in plan.units(wildcards.variant)},
        variant=lambda wildcards: plan.learning(wildcards.variant),
        collection=plan.collection(),
        code=plan.code("allocate"),
    message:
        "Parting the bytes of {wildcards.variant} among its matrices"
    script:
        "../../scripts/allocate_bytes.py"
