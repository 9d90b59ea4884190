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
        # of the dense model, which is the one that writes them
        states=next(map(Path, snakemake.output.get("states") or snakemake.input.get("states") or ()), None),
        dense=Path(snakemake.input.dense) if snakemake.input.get("dense") else None,
        device=choose_device(snakemake.params.device),
        threads=snakemake.threads,
        code=[snakemake.params.code, snakemake.params.tasks],
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
