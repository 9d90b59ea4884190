rule summarize:
    input:
        model=plan.model_folder,
        models=[plan.model_of(variant) for variant in plan.variants],
        evaluations=expand(rules.evaluate_model.output, name=plan.models),
        learned=plan.of_all_units(rules.learn_dictionary.output.diagnostics),
        packed=plan.of_all_units(rules.quantize_codes.output.diagnostics),
        pruned=plan.pruning_files(rules.prune_model.output.report).values(),
    output:
        table=report(
            "<results>/summary.tsv",
            category="Results",
            labels={"what": "table", "of": "all models"},
            caption="../report/table.rst",
        ),
        page=report(
            "<results>/summary.html",
            category="Results",
            labels={"what": "table, formatted", "of": "all models"},
            caption="../report/table.rst",
        ),
        samples=report(
            "<results>/samples.html",
            category="Results",
            labels={"what": "generated texts", "of": "all models"},
            caption="../report/samples.rst",
        ),
        errors=report(
            "<results>/plots/errors.svg",
            category="Plots",
            labels={"what": "error of every matrix", "of": "all variants"},
            caption="../report/errors.rst",
        ),
        pareto=report(
            "<results>/plots/pareto.svg",
            category="Plots",
            labels={"what": "bytes against perplexity", "of": "all models"},
            caption="../report/pareto.rst",
        ),
        convergence=report(
            "<results>/plots/convergence.svg",
            category="Plots",
            labels={"what": "convergence of learning", "of": "all variants"},
            caption="../report/convergence.rst",
        ),
        summary="<results>/summary.json",
        text="<results>/samples.md",
        png=expand("<results>/plots/{plot}.png", plot=["errors", "pareto", "convergence"]),
    log:
        "<logs>/summarize.log",
    benchmark:
        "<benchmarks>/summarize.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        run=plan.reported(),
        units={variant: plan.units(variant) for variant in plan.variants},
        pruned=plan.pruning_files(rules.prune_model.output.report),
        code=code_digest("cospadi.report"),
    message:
        "Writing the table and the plots"
    script:
        "../../scripts/summarize.py"


rule report:
    input:
        rules.summarize_training.output if config["training"] else rules.summarize.output,
        rules.plot_distances.output if plan.pruned_bases and not config["training"] else [],
    output:
        archive="<results>/report.zip",
        config="<results>/config.yaml",
    log:
        "<logs>/report.log",
    localrule: True
    conda:
        "../../envs/cospadi.yaml"
    params:
        config=config,
        snakefile=workflow.main_snakefile,
    message:
        "Writing the report"
    script:
        "../../scripts/report.py"
