rule summarize:
    input:
        model=plan.model_input(),
        models=[plan.model_of(variant) for variant in plan.variants],
        evaluations=[*rules.evaluate_dense.output, *expand(rules.evaluate_model.output, variant=plan.variants)],
        learned=plan.of_all_units(rules.learn_dictionary.output.diagnostics),
        packed=plan.of_all_units(rules.quantize_codes.output.diagnostics),
        distilled=[folder for variant in plan.factorized for folder in plan.distilled_of(variant)],
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
        explore=report(
            "<results>/explore.html",
            category="Results",
            labels={"what": "plots to explore, texts", "of": "all models"},
            caption="../report/explore.rst",
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
        accuracy=report(
            "<results>/plots/accuracy.svg",
            category="Plots",
            labels={"what": "bytes against accuracy", "of": "all models"},
            caption="../report/accuracy.rst",
        ),
        allocation=report(
            "<results>/plots/allocation.svg",
            category="Plots",
            labels={"what": "bits of every matrix", "of": "variants that part bytes"},
            caption="../report/allocation.rst",
        ),
        convergence=report(
            "<results>/plots/convergence.svg",
            category="Plots",
            labels={"what": "convergence of learning", "of": "all variants"},
            caption="../report/convergence.rst",
        ),
        trace=report(
            "<results>/plots/trace.svg",
            category="Plots",
            labels={"what": "jobs over time", "of": "the run"},
            caption="../report/trace.rst",
        ),
        summary="<results>/summary.json",
        frontier="<results>/frontier.tsv",
        text="<results>/samples.md",
        png=expand(
            "<results>/plots/{plot}.png", plot=["errors", "pareto", "accuracy", "allocation", "convergence", "trace"]
        ),
    log:
        "<logs>/summarize.log",
    benchmark:
        "<benchmarks>/summarize.tsv"
    conda:
        "../../envs/cospadi.yaml"
    resources:
        **plan.resources("summarize"),
    params:
        run=plan.reported(),
        model=plan.model_digest(WEIGHTS),
        units={variant: plan.units(variant) for variant in plan.variants},
        pruned={name: str(path) for name, path in plan.pruning_files(rules.prune_model.output.report).items()},
        rules=[stage.rule for stage in plan.stages.values()],
        code=plan.code("summarize"),
    message:
        "Writing the table and the plots"
    script:
        "../../scripts/summarize.py"
