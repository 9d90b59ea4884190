rule evaluate_model:
    input:
        model=lambda wildcards: plan.model_of(wildcards.name),
        heldout=plan.text_file("heldout"),
    output:
        "<results>/{name}/eval.json",
    log:
        "<logs>/evaluate_model/{name}.log",
    benchmark:
        "<benchmarks>/evaluate_model/{name}.tsv"
    conda:
        "../../envs/cospadi.yaml"
    threads: config["threads"]["evaluate"]
    resources:
        mem_mb=plan.mem_mb("evaluate"),
        runtime=plan.runtime("evaluate"),
        gpu=plan.gpus(),
    params:
        evaluation=config["evaluation"],
        device=config["device"],
        code=code_digest("cospadi.evaluation"),
    message:
        "Evaluating {wildcards.name}"
    script:
        "../../scripts/evaluate_model.py"
