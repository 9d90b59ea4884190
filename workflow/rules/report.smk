rule report:
    input:
        reported,
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
        outer=outer,
        snakefile=workflow.main_snakefile,
    message:
        "Writing the report"
    script:
        "../../scripts/report.py"
