# Against the flow: a chunk after the one behind it, from the hidden states of the one before it.
rule collect_gradients:
    input:
        model=lambda wildcards: plan.model_input(wildcards.base),
        structure=rules.inspect_model.output[0],
        windows=rules.prepare_calibration.output[0],
        hidden=lambda wildcards: plan.hidden_before(int(wildcards.first), wildcards.base),
        gradient=lambda wildcards: plan.gradient_behind(int(wildcards.last), wildcards.base),
    output:
        moments="<results>/{base}gradients/layers_{first}-{last}.h5",
        gradient=temp("<results>/{base}gradients/hidden_{first}-{last}.h5"),
    log:
        "<logs>/{base}collect_gradients/layers_{first}-{last}.log",
    benchmark:
        "<benchmarks>/{base}collect_gradients/layers_{first}-{last}.tsv"
    priority: plan.priority("gradients")
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("gradients")
    resources:
        **plan.resources("gradients"),
    params:
        collection=plan.collection(),
        gram=config["gram"],
        model=lambda wildcards: plan.model_digest(WEIGHTS, base=wildcards.base),
        device=config["device"],
        code=plan.code("gradients"),
    message:
        "Collecting the gradients at the matrices of layers {wildcards.first} to {wildcards.last}"
    script:
        "../../scripts/collect_gradients.py"
