rule learn_dictionary:
    input:
        model=lambda wildcards: plan.base_model(plan.base_of(wildcards.variant)),
        structure=lambda wildcards: plan.structure_of(plan.base_of(wildcards.variant)),
        gram=lambda wildcards: plan.grams_of(wildcards.unit, plan.base_of(wildcards.variant)),
    output:
        factors="<results>/{variant}/factors/{unit}.safetensors",
        diagnostics="<results>/{variant}/factors/{unit}.json",
    log:
        "<logs>/learn_dictionary/{variant}/{unit}.log",
    benchmark:
        "<benchmarks>/learn_dictionary/{variant}/{unit}.tsv"
    conda:
        "../../envs/cospadi.yaml"
    threads: config["threads"]["learn"]
    resources:
        mem_mb=plan.mem_mb("learn"),
        runtime=plan.runtime("learn"),
        gpu=plan.gpus(),
    params:
        layers=lambda wildcards: layers_of(wildcards.unit),
        variant=lambda wildcards: plan.learning(wildcards.variant),
        device=config["device"],
        code=lambda wildcards: plan.learning_code(wildcards.variant),
    message:
        "Learning {wildcards.variant}, {wildcards.unit}"
    script:
        "../../scripts/learn_dictionary.py"
