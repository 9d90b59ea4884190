rule evaluate_model:
    input:
        model=lambda wildcards: plan.model_input() if wildcards.name == DENSE else plan.model_of(wildcards.name),
        heldout=plan.text_file("heldout"),
    output:
        "<results>/{name}/eval.json",
    log:
        "<logs>/evaluate_model/{name}.log",
    benchmark:
        "<benchmarks>/evaluate_model/{name}.tsv"
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("evaluate")
    resources:
        mem_mb=plan.mem_mb("evaluate"),
        runtime=plan.runtime("evaluate"),
        gpu=plan.gpus("evaluate"),
    params:
        evaluation=config["evaluation"],
        model=lambda wildcards: plan.model_digest(WEIGHTS, TOKENIZER) if wildcards.name == DENSE else None,
        tasks=plan.tasks_digest(),
        device=config["device"],
        code=plan.code("evaluate"),
    message:
        "Evaluating {wildcards.name}"
    script:
        "../../scripts/evaluate_model.py"
