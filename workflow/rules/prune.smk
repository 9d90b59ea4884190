# Blocks are chosen and removed here; what is left is an ordinary model, and a base for the rules that factorize.
rule measure_distances:
    input:
        model=plan.model_input(),
        structure="<results>/structure.json",
        windows=rules.prepare_calibration.output[0],
    output:
        "<results>/pruning/distances.json",
    log:
        "<logs>/measure_distances.log",
    benchmark:
        "<benchmarks>/measure_distances.tsv"
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("distances")
    resources:
        **plan.resources("distances"),
    params:
        samples=config["pruning"]["samples"],
        walk=plan.pruning(),
        model=plan.model_digest(WEIGHTS),
        device=config["device"],
        code=plan.code("distances"),
    message:
        "Measuring how far the activations move from block to block"
    script:
        "../../scripts/measure_distances.py"


rule plot_distances:
    input:
        distances=rules.measure_distances.output[0],
        structure="<results>/structure.json",
        windows=rules.prepare_calibration.output[0],
    output:
        report(
            "<results>/plots/distances.svg",
            category="Plots",
            labels={"what": "distance over every cut", "of": "dense model"},
            caption="../report/distances.rst",
        ),
        "<results>/plots/distances.png",
    log:
        "<logs>/plot_distances.log",
    benchmark:
        "<benchmarks>/plot_distances.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        **plan.resources("plot_distances"),
    params:
        samples=config["pruning"]["samples"],
        walk=plan.pruning(),
        code=plan.code("plot_distances"),
    message:
        "Plotting the distances"
    script:
        "../../scripts/plot_distances.py"


rule select_blocks:
    input:
        distances=rules.measure_distances.output[0],
        structure="<results>/structure.json",
        windows=rules.prepare_calibration.output[0],
    output:
        "<results>/{base}pruning/selection.json",
    log:
        "<logs>/{base}select_blocks.log",
    benchmark:
        "<benchmarks>/{base}select_blocks.tsv"
    wildcard_constraints:
        base=one_of(plan.pruned_bases),
    conda:
        "../../envs/cospadi.yaml"
    resources:
        **plan.resources("select"),
    params:
        settings=lambda wildcards: plan.pruned_bases[wildcards.base],
        samples=config["pruning"]["samples"],
        walk=plan.pruning(),
        code=plan.code("select"),
    message:
        "Choosing the blocks that go ({wildcards.base})"
    script:
        "../../scripts/select_blocks.py"


rule fit_transforms:
    input:
        model=plan.model_input(),
        structure="<results>/structure.json",
        windows=rules.prepare_calibration.output[0],
        selection=rules.select_blocks.output[0],
    output:
        transforms="<results>/{base}pruning/transforms.safetensors",
        diagnostics="<results>/{base}pruning/transforms.json",
    log:
        "<logs>/{base}fit_transforms.log",
    benchmark:
        "<benchmarks>/{base}fit_transforms.tsv"
    wildcard_constraints:
        base=one_of([base for base in plan.pruned_bases if plan.fits(base)]),
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("fit")
    resources:
        **plan.resources("fit"),
    params:
        settings=lambda wildcards: plan.pruned_bases[wildcards.base],
        walk=plan.pruning(),
        model=plan.model_digest(WEIGHTS),
        device=config["device"],
        code=plan.code("fit"),
    message:
        "Fitting what makes up for the blocks that go ({wildcards.base})"
    script:
        "../../scripts/fit_transforms.py"


rule prune_model:
    input:
        model=plan.model_input(),
        structure="<results>/structure.json",
        windows=rules.prepare_calibration.output[0],
        selection=rules.select_blocks.output[0],
        fitted=lambda wildcards: (
            [rules.fit_transforms.output.transforms, rules.fit_transforms.output.diagnostics]
            if plan.fits(wildcards.base)
            else []
        ),
    output:
        model=directory("<results>/{base}model"),
        report="<results>/{base}pruning/pruned.json",
    log:
        "<logs>/{base}prune_model.log",
    benchmark:
        "<benchmarks>/{base}prune_model.tsv"
    wildcard_constraints:
        base=one_of(plan.pruned_bases),
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("prune")
    resources:
        **plan.resources("prune"),
    params:
        model=plan.model_digest(ALL),
        settings=lambda wildcards: plan.pruned_bases[wildcards.base],
        walk=plan.pruning(),
        code=plan.code("prune"),
    message:
        "Writing {output.model}, without the blocks that go"
    script:
        "../../scripts/prune_model.py"
