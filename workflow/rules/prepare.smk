rule prepare_calibration:
    input:
        model=plan.model_input(),
        text=plan.text_file("calibration"),
    output:
        "<results>/calibration.h5",
    log:
        "<logs>/prepare_calibration.log",
    benchmark:
        "<benchmarks>/prepare_calibration.tsv"
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("prepare")
    resources:
        **plan.resources("prepare"),
    params:
        windows=plan.windows(),
        model=plan.model_digest(TOKENIZER, *([WEIGHTS] if config["calibration"]["source"] == "self" else [])),
        code=plan.code("prepare"),
    message:
        "Cutting {params.windows[samples]} calibration windows of {params.windows[length]} tokens"
    script:
        "../../scripts/prepare_calibration.py"
