from cospadi.digests import files_digest
from cospadi.outside import text_files


# It runs where snakemake runs: on a cluster, compute nodes often reach no network.
rule fetch_text:
    input:
        text=text_files(config["text"]),
        model=plan.template_model(),
    output:
        calibration="<resources>/text/{text}/calibration.jsonl",
        heldout="<resources>/text/{text}/heldout.jsonl",
    log:
        "<logs>/fetch_text/{text}.log",
    benchmark:
        "<benchmarks>/fetch_text/{text}.tsv"
    cache: caching
    localrule: True
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("text")
    resources:
        **plan.resources("text"),
    params:
        text=config["text"],
        template=plan.template_digest(),
        content=files_digest(text_files(config["text"])),
        code=plan.code("text"),
    message:
        "Fetching the text {wildcards.text}, split into calibration and held-out articles"
    script:
        "../../scripts/fetch_text.py"
