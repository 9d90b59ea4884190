rule assemble_model:
    input:
        model=lambda wildcards: plan.model_input(plan.base_of(wildcards.variant)),
        windows=rules.prepare_calibration.output[0],
        head=lambda wildcards: plan.head_of(wildcards.variant),
        codes=lambda wildcards: expand(
            rules.quantize_codes.output.codes,
            unit=plan.units(wildcards.variant),
            allow_missing=True,
        ),
        diagnostics=lambda wildcards: expand(
            rules.quantize_codes.output.diagnostics,
            unit=plan.units(wildcards.variant),
            allow_missing=True,
        ),
    output:
        directory("<results>/{variant}/model"),
    log:
        "<logs>/assemble_model/{variant}.log",
    benchmark:
        "<benchmarks>/assemble_model/{variant}.tsv"
    wildcard_constraints:
        variant=one_of(plan.factorized + plan.choosing),
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("assemble")
    resources:
        **plan.resources("assemble"),
    params:
        variant=lambda wildcards: config["variants"][wildcards.variant],
        targets=lambda wildcards: plan.packed(wildcards.variant)[0]["targets"],
        embedding=lambda wildcards: plan.embedding(wildcards.variant),
        collection=plan.collection(),
        model=lambda wildcards: plan.model_digest(ALL, base=plan.base_of(wildcards.variant)),
        code=plan.code("assemble"),
    message:
        "Assembling the checkpoint of {wildcards.variant}"
    script:
        "../../scripts/assemble_model.py"


rule densify:
    input:
        rules.assemble_model.output[0],
    output:
        directory("<results>/{variant}/dense"),
    log:
        "<logs>/densify/{variant}.log",
    benchmark:
        "<benchmarks>/densify/{variant}.tsv"
    wildcard_constraints:
        variant=one_of(plan.factorized + plan.choosing),
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("densify")
    resources:
        **plan.resources("densify"),
    params:
        code=plan.code("densify"),
    message:
        "Writing {wildcards.variant} as an ordinary dense model"
    script:
        "../../scripts/densify.py"
