# The activations are temporary: once they are gone, Snakemake cannot see that their rule changed. So what they
# depend on (model, windows, settings, code) is repeated here.
rule compute_gram:
    input:
        structure=rules.inspect_model.output[0],
        windows=rules.prepare_calibration.output[0],
        activations=lambda wildcards: plan.activations_of(int(wildcards.layer), wildcards.base),
    output:
        "<results>/{base}gram/layer_{layer}.h5",
    log:
        "<logs>/{base}compute_gram/layer_{layer}.log",
    benchmark:
        "<benchmarks>/{base}compute_gram/layer_{layer}.tsv"
    cache: caching
    group:
        plan.group("gram")
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("gram")
    resources:
        **plan.resources("gram"),
    params:
        layer=lambda wildcards: int(wildcards.layer),
        gram=config["gram"],
        collection=plan.collection(),
        model=lambda wildcards: plan.model_digest(WEIGHTS, base=wildcards.base),
        code=plan.code("gram"),
    message:
        "Computing the Grams of layer {wildcards.layer}"
    script:
        "../../scripts/compute_gram.py"
