rule train_tokenizer:
    input:
        lambda wildcards: plan.text_file("calibration"),
    output:
        directory("<results>/training/tokenizer"),
    log:
        "<logs>/train_tokenizer.log",
    benchmark:
        "<benchmarks>/train_tokenizer.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        **plan.resources("tokenizer"),
    params:
        vocabulary=lambda wildcards: plan.settings("language")["vocabulary"],
        code=plan.code("tokenizer"),
    message:
        "Making a tokenizer of {params.vocabulary} tokens from the text"
    script:
        "../../scripts/train_tokenizer.py"


rule tokenize_text:
    input:
        tokenizer=rules.train_tokenizer.output[0],
        text=lambda wildcards: plan.text_file("calibration"),
        heldout=lambda wildcards: plan.text_file("heldout"),
    output:
        "<results>/training/tokens.safetensors",
    log:
        "<logs>/tokenize_text.log",
    benchmark:
        "<benchmarks>/tokenize_text.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        **plan.resources("tokens"),
    params:
        code=plan.code("tokens"),
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
    threads: plan.threads("train")
    resources:
        **plan.resources("train"),
    params:
        settings=lambda wildcards: plan.settings(wildcards.experiment),
        variant=lambda wildcards: config["training"][wildcards.experiment]["variants"][wildcards.trained],
        device=config["device"],
        code=plan.code("train"),
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
        **plan.resources("materialise"),
    params:
        code=plan.code("materialise"),
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
        **plan.resources("summarize"),
    params:
        training=config["training"],
        code=plan.code("summarize"),
    message:
        "Writing the table and the curves"
    script:
        "../../scripts/summarize_training.py"
