"""Walk the windows through a chunk of layers and keep what enters their matrices."""

from pathlib import Path

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.calibration.collect import collect
    from cospadi.structure import read_structure

    settings = snakemake.params.collection
    collect(
        Path(snakemake.input.model),
        read_structure(snakemake.input.structure),
        Path(snakemake.input.windows),
        range(int(snakemake.wildcards.first), int(snakemake.wildcards.last) + 1),
        hidden_in=Path(snakemake.input.hidden[0]) if snakemake.input.hidden else None,
        rows_out=Path(snakemake.output.rows),
        hidden_out=Path(snakemake.output.hidden),
        mode=settings["mode"],
        dtype=settings["dtype"],
        batch_tokens=settings["batch_tokens"],
        heldout_fraction=settings["heldout_fraction"],
        device=choose_device(snakemake.params.device),
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
