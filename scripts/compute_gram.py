"""Second moments of what enters each matrix of a layer."""

from pathlib import Path

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.gram import compute_gram
    from cospadi.structure import read_structure

    compute_gram(
        Path(snakemake.input.activations),
        int(snakemake.wildcards.layer),
        Path(snakemake.output[0]),
        structure=read_structure(snakemake.input.structure),
        calibration=calibration_of(snakemake.input.windows, snakemake.params.collection),
        heldout_fraction=snakemake.params.collection["heldout_fraction"],
        dtype=snakemake.params.gram["dtype"],
    )


if __name__ == "__main__":
    script(main, snakemake)
