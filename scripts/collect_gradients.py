"""Send the gradient of the loss back through a chunk of layers and keep what errors in their matrices cost."""

from pathlib import Path

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.calibration.gradients import collect_gradients
    from cospadi.structure import read_structure

    settings = snakemake.params.collection
    collect_gradients(
        Path(snakemake.input.model),
        read_structure(snakemake.input.structure),
        Path(snakemake.input.windows),
        range(int(snakemake.wildcards.first), int(snakemake.wildcards.last) + 1),
        hidden_in=next(map(Path, snakemake.input.hidden), None),
        gradient_in=next(map(Path, snakemake.input.gradient), None),
        moments_out=Path(snakemake.output.moments),
        gradient_out=Path(snakemake.output.gradient),
        dtype=settings["dtype"],
        batch_tokens=settings["batch_tokens"],
        heldout_fraction=settings["heldout_fraction"],
        gram_dtype=snakemake.params.gram["dtype"],
        device=choose_device(snakemake.params.device),
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
