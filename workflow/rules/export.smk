from cospadi.exports import GGUF_TYPES


rule export_gguf:
    input:
        rules.assemble_model.output[0],
    output:
        "<results>/{variant}/gguf/{kind}.gguf",
    log:
        "<logs>/export_gguf/{variant}-{kind}.log",
    benchmark:
        "<benchmarks>/export_gguf/{variant}-{kind}.tsv"
    wildcard_constraints:
        variant=one_of(plan.factorized + plan.choosing),
        kind="|".join(GGUF_TYPES),
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("gguf")
    resources:
        **plan.resources("gguf"),
    params:
        code=plan.code("gguf"),
    message:
        "Writing {wildcards.variant} as GGUF, {wildcards.kind}"
    script:
        "../../scripts/export_gguf.py"


rule export_compressed_tensors:
    input:
        rules.assemble_model.output[0],
    output:
        directory("<results>/{variant}/compressed-tensors"),
    log:
        "<logs>/export_compressed_tensors/{variant}.log",
    benchmark:
        "<benchmarks>/export_compressed_tensors/{variant}.tsv"
    wildcard_constraints:
        variant=one_of(plan.factorized + plan.choosing),
    conda:
        "../../envs/cospadi.yaml"
    threads: plan.threads("compressed_tensors")
    resources:
        **plan.resources("compressed_tensors"),
    params:
        code=plan.code("compressed_tensors"),
    message:
        "Writing {wildcards.variant} for compressed-tensors"
    script:
        "../../scripts/export_compressed_tensors.py"
