# A variant made of the parts of finished ones: chosen once, taken unit by unit.
rule choose_variants:
    input:
        learned=lambda wildcards: plan.of_sources(rules.learn_dictionary.output.diagnostics, wildcards.variant),
        stored=lambda wildcards: plan.of_sources(rules.quantize_codes.output.diagnostics, wildcards.variant),
        codes=lambda wildcards: plan.of_sources(rules.quantize_codes.output.codes, wildcards.variant),
        model=plan.model_input(),
        windows=rules.prepare_calibration.output[0],
    output:
        choice="<results>/{variant}/choice.json",
        table="<results>/{variant}/allocation.tsv",
    log:
        "<logs>/choose_variants/{variant}.log",
    benchmark:
        "<benchmarks>/choose_variants/{variant}.tsv"
    wildcard_constraints:
        variant=one_of(plan.choosing),
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("choose")
    resources:
        **plan.resources("choose"),
    params:
        variants=lambda wildcards: plan.source_folders(wildcards.variant),
        units=lambda wildcards: plan.units(wildcards.variant),
        settings=lambda wildcards: config["variants"][wildcards.variant],
        collection=plan.collection(),
        dtype=config["evaluation"]["dtype"],
        device=config["device"],
        code=plan.code("choose"),
    message:
        "Choosing among the variants of {wildcards.variant}"
    script:
        "../../scripts/choose_variants.py"


rule take_unit:
    input:
        model=plan.model_input(),
        choice=rules.choose_variants.output.choice,
        learned=lambda wildcards: plan.of_sources(
            rules.learn_dictionary.output.diagnostics, wildcards.variant, wildcards.unit
        ),
        stored=lambda wildcards: plan.of_sources(
            rules.quantize_codes.output.diagnostics, wildcards.variant, wildcards.unit
        ),
        codes=lambda wildcards: plan.of_sources(rules.quantize_codes.output.codes, wildcards.variant, wildcards.unit),
    output:
        learned="<results>/{variant}/factors/{unit}.json",
        stored="<results>/{variant}/codes/{unit}.json",
        codes="<results>/{variant}/codes/{unit}.safetensors",
    log:
        "<logs>/take_unit/{variant}/{unit}.log",
    benchmark:
        "<benchmarks>/take_unit/{variant}/{unit}.tsv"
    wildcard_constraints:
        variant=one_of(plan.choosing),
    conda:
        "../../envs/cospadi.yaml"
    resources:
        **plan.resources("take"),
    params:
        variants=lambda wildcards: plan.source_folders(wildcards.variant),
        model=plan.model_digest(WEIGHTS),
        layers=lambda wildcards: layers_of(wildcards.unit),
        settings=lambda wildcards: config["variants"][wildcards.variant],
        code=plan.code("take"),
    message:
        "Taking the parts of {wildcards.variant}, {wildcards.unit}"
    script:
        "../../scripts/take_unit.py"
