# Hidden states stay: gradients and the head may be asked for when all is learned, and a job that runs again for one
# temporary file has all jobs run again that read another file of it.
rule collect_activations:
    input:
        model=lambda wildcards: plan.model_input(wildcards.base),
        structure=rules.inspect_model.output[0],
        windows=rules.prepare_calibration.output[0],
        hidden=lambda wildcards: plan.hidden_before(int(wildcards.first), wildcards.base),
    output:
        rows=temp("<results>/{base}activations/layers_{first}-{last}.h5"),
        hidden="<results>/{base}hidden/layers_{first}-{last}.h5",
    log:
        "<logs>/{base}collect_activations/layers_{first}-{last}.log",
    benchmark:
        "<benchmarks>/{base}collect_activations/layers_{first}-{last}.tsv"
    cache: caching
    priority: plan.priority("collect")
    group:
        plan.group("collect")
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("collect")
    resources:
        **plan.resources("collect"),
    params:
        layers=lambda wildcards: [int(wildcards.first), int(wildcards.last)],
        collection=plan.collection(),
        model=lambda wildcards: plan.model_digest(WEIGHTS, base=wildcards.base),
        device=config["device"],
        code=plan.code("collect"),
    message:
        "Collecting what enters the matrices of layers {wildcards.first} to {wildcards.last}"
    script:
        "../../scripts/collect_activations.py"
