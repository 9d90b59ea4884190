# Both run where snakemake runs: on a cluster, compute nodes often reach no network.
rule fetch_model:
    output:
        directory(f"<resources>/models/{config['model']['name']}"),
    log:
        "<logs>/fetch_model.log",
    benchmark:
        "<benchmarks>/fetch_model.tsv"
    localrule: True
    conda:
        "../../envs/cospadi.yaml"
    threads: config["threads"]["fetch"]
    resources:
        mem_mb=plan.mem_mb("fetch"),
        runtime=plan.runtime("fetch"),
    params:
        model=config["model"],
        code=code_digest("cospadi.sources.models"),
    message:
        "Fetching the model {params.model[name]}"
    script:
        "../../scripts/fetch_model.py"


rule fetch_text:
    output:
        calibration="<resources>/text/{text}/calibration.jsonl",
        heldout="<resources>/text/{text}/heldout.jsonl",
    log:
        "<logs>/fetch_text/{text}.log",
    benchmark:
        "<benchmarks>/fetch_text/{text}.tsv"
    localrule: True
    conda:
        "../../envs/cospadi.yaml"
    threads: config["threads"]["fetch"]
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 30 * attempt,
    params:
        text=config["text"],
        code=code_digest("cospadi.sources.texts"),
    message:
        "Fetching the text {wildcards.text}, split into calibration and held-out articles"
    script:
        "../../scripts/fetch_text.py"
