# It runs where snakemake runs: on a cluster, compute nodes often reach no network.
rule fetch_model:
    output:
        directory(f"<resources>/models/{config['model']['name']}"),
    log:
        "<logs>/fetch_model.log",
    benchmark:
        "<benchmarks>/fetch_model.tsv"
    cache: caching
    localrule: True
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("fetch")
    resources:
        **plan.resources("fetch"),
    params:
        model=config["model"],
        planned=plan.planned_digest(),
        code=plan.code("fetch"),
    message:
        "Fetching the model {params.model[name]}"
    script:
        "../../scripts/fetch_model.py"
