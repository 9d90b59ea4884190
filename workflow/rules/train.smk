# Small models trained from scratch: a run whose config has a section `training` makes these and nothing else.
rule train_tokenizer:
    input:
        lambda wildcards: f"resources/text/{config['text']['name']}/calibration.jsonl",
    output:
        directory("<results>/training/tokenizer"),
    log:
        "<logs>/train_tokenizer.log",
    benchmark:
        "<benchmarks>/train_tokenizer.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 3000 * attempt,
        runtime=lambda wildcards, attempt: 20 * attempt,
    params:
        vocabulary=lambda wildcards: plan.training("language")["vocabulary"],
        code=code_digest("cospadi.masa.text"),
    message:
        "Making a tokenizer of {params.vocabulary} tokens from the text"
    script:
        "../../scripts/train_tokenizer.py"


rule tokenize_text:
    input:
        tokenizer=rules.train_tokenizer.output[0],
        text=lambda wildcards: f"resources/text/{config['text']['name']}/calibration.jsonl",
        heldout=lambda wildcards: f"resources/text/{config['text']['name']}/heldout.jsonl",
    output:
        "<results>/training/tokens.safetensors",
    log:
        "<logs>/tokenize_text.log",
    benchmark:
        "<benchmarks>/tokenize_text.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 3000 * attempt,
        runtime=lambda wildcards, attempt: 20 * attempt,
    params:
        code=code_digest("cospadi.masa.text"),
    message:
        "Turning the text into tokens"
    script:
        "../../scripts/tokenize_text.py"


rule train_model:
    input:
        text=lambda wildcards: (
            [rules.tokenize_text.output[0], rules.train_tokenizer.output[0]]
            if wildcards.experiment == "language"
            else []
        ),
    output:
        model=directory("<results>/training/{experiment}/{trained}/seed_{seed}/model"),
        history="<results>/training/{experiment}/{trained}/seed_{seed}/history.json",
    log:
        "<logs>/train_model/{experiment}/{trained}/seed_{seed}.log",
    benchmark:
        "<benchmarks>/train_model/{experiment}/{trained}/seed_{seed}.tsv"
    conda:
        "../../envs/cospadi.yaml"
    threads: config["threads"]["train"]
    resources:
        mem_mb=plan.mem_mb("train"),
        runtime=plan.runtime("train"),
        gpu=plan.gpus(),
    params:
        settings=lambda wildcards: plan.training(wildcards.experiment),
        variant=lambda wildcards: config["training"][wildcards.experiment]["variants"][wildcards.trained],
        device=config["device"],
        code=code_digest("cospadi.masa.training"),
    message:
        "Training {wildcards.trained} from scratch ({wildcards.experiment}, seed {wildcards.seed})"
    script:
        "../../scripts/train_model.py"


rule materialise:
    input:
        rules.train_model.output.model,
    output:
        directory("<results>/training/{experiment}/{trained}/seed_{seed}/dense"),
    log:
        "<logs>/materialise/{experiment}/{trained}/seed_{seed}.log",
    benchmark:
        "<benchmarks>/materialise/{experiment}/{trained}/seed_{seed}.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        mem_mb=plan.mem_mb("train"),
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        code=code_digest("cospadi.masa.models"),
    message:
        "Writing {wildcards.trained}, seed {wildcards.seed}, as an ordinary model"
    script:
        "../../scripts/materialise.py"


rule summarize_training:
    input:
        plan.trained(rules.train_model.output.history),
    output:
        table=report(
            "<results>/training.tsv",
            category="Results",
            labels={"what": "table", "of": "all models"},
            caption="../report/trained.rst",
        ),
        page=report(
            "<results>/training.html",
            category="Results",
            labels={"what": "table, formatted", "of": "all models"},
            caption="../report/trained.rst",
        ),
        curves=report(
            "<results>/plots/training.svg",
            category="Plots",
            labels={"what": "loss curves", "of": "all models"},
            caption="../report/curves.rst",
        ),
        summary="<results>/training.json",
        png="<results>/plots/training.png",
    log:
        "<logs>/summarize_training.log",
    benchmark:
        "<benchmarks>/summarize_training.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        training=config["training"],
        code=code_digest("cospadi.report.training"),
    message:
        "Writing the table and the curves"
    script:
        "../../scripts/summarize_training.py"
