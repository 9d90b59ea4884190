rule measure_head:
    input:
        model=lambda wildcards: plan.model_input(wildcards.base),
        structure=rules.inspect_model.output[0],
        windows=rules.prepare_calibration.output[0],
        hidden=lambda wildcards: plan.hidden_before(plan.n_layers_of(wildcards.base), wildcards.base),
    output:
        "<results>/{base}head.h5",
    log:
        "<logs>/{base}measure_head.log",
    benchmark:
        "<benchmarks>/{base}measure_head.tsv"
    priority: plan.priority("head")
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("head")
    resources:
        **plan.resources("head"),
    params:
        collection=plan.collection(),
        model=lambda wildcards: plan.model_digest(WEIGHTS, base=wildcards.base),
        device=config["device"],
        code=plan.code("head"),
    message:
        "Measuring what errors in the last matrix cost the loss"
    script:
        "../../scripts/measure_head.py"
