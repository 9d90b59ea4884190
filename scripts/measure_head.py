"""Measure what errors in the last matrix of a model cost the loss."""

from pathlib import Path

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.calibration.head import measure_head
    from cospadi.structure import read_structure

    settings = snakemake.params.collection
    measure_head(
        Path(snakemake.input.model),
        read_structure(snakemake.input.structure),
        Path(snakemake.input.windows),
        hidden_in=Path(snakemake.input.hidden[0]),
        output=Path(snakemake.output[0]),
        batch_tokens=settings["batch_tokens"],
        heldout_fraction=settings["heldout_fraction"],
        device=choose_device(snakemake.params.device),
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
