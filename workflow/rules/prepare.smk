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


# the same for training end to end, which wants more text
rule prepare_windows:
    input:
        model=plan.model_input(),
        text=plan.text_file("calibration"),
    output:
        "<results>/windows/{samples}.h5",
    log:
        "<logs>/prepare_windows/{samples}.log",
    benchmark:
        "<benchmarks>/prepare_windows/{samples}.tsv"
    wildcard_constraints:
        samples=r"\d+",
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("more")
    resources:
        **plan.resources("more"),
    params:
        windows=lambda wildcards: plan.windows(int(wildcards.samples)),
        model=plan.model_digest(TOKENIZER, *([WEIGHTS] if config["calibration"]["source"] == "self" else [])),
        code=plan.code("more"),
    message:
        "Cutting {params.windows[samples]} windows of {params.windows[length]} tokens to train on"
    script:
        "../../scripts/prepare_calibration.py"
