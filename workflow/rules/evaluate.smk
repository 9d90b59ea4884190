# The dense model, and what the variants are compared with.
rule evaluate_dense:
    input:
        model=plan.model_input(),
        heldout=plan.text_file("heldout"),
        # not read: what all layers wait for goes first, and a model that cannot be taken apart is told before
        structure=expand(rules.inspect_model.output, base=[base for base in plan.inspected_bases() if not base]),
    output:
        scores="<results>/dense/eval.json",
        states=plan.dense_states(),
    log:
        "<logs>/evaluate_dense.log",
    benchmark:
        "<benchmarks>/evaluate_dense.tsv"
    priority: plan.priority("evaluate_dense")
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("evaluate_dense")
    resources:
        **plan.resources("evaluate_dense"),
    params:
        evaluation=config["evaluation"],
        model=lambda wildcards: plan.model_digest(WEIGHTS, TOKENIZER),
        tasks=plan.tasks_digest(),
        device=config["device"],
        code=plan.code("evaluate_dense"),
    message:
        "Evaluating the dense model"
    script:
        "../../scripts/evaluate_model.py"


rule evaluate_model:
    input:
        model=lambda wildcards: plan.model_of(wildcards.variant),
        heldout=plan.text_file("heldout"),
        states=plan.dense_states(),
        dense=plan.model_input() if plan.dense_states() else [],
    output:
        "<results>/{variant}/eval.json",
    log:
        "<logs>/evaluate_model/{variant}.log",
    benchmark:
        "<benchmarks>/evaluate_model/{variant}.tsv"
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("evaluate")
    resources:
        **plan.resources("evaluate"),
    params:
        evaluation=config["evaluation"],
        tasks=plan.tasks_digest(),
        device=config["device"],
        code=plan.code("evaluate"),
    message:
        "Evaluating {wildcards.variant}"
    script:
        "../../scripts/evaluate_model.py"
