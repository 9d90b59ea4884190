rule inspect_model:
    input:
        model=lambda wildcards: plan.model_input(wildcards.base),
    output:
        "<results>/{base}structure.json",
    log:
        "<logs>/{base}inspect_model.log",
    benchmark:
        "<benchmarks>/{base}inspect_model.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        **plan.resources("inspect"),
    params:
        model=lambda wildcards: plan.model_digest(WEIGHTS, TOKENIZER, base=wildcards.base),
        code=plan.code("inspect"),
    message:
        "Finding the matrices of {input.model}"
    script:
        "../../scripts/inspect_model.py"
