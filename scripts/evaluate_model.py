"""Perplexity, tasks and generated text of one model."""

from pathlib import Path

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.evaluation.evaluate import evaluate

    evaluate(
        Path(snakemake.input.model),
        snakemake.params.evaluation,
        heldout=Path(snakemake.input.heldout[0]) if snakemake.input.heldout else None,
        output=Path(snakemake.output[0]),
        device=choose_device(snakemake.params.device),
        threads=snakemake.threads,
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
