"""Second moments of what enters each matrix of a layer."""

from pathlib import Path

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.files import read_json
    from cospadi.gram import compute_gram

    compute_gram(
        Path(snakemake.input.activations),
        int(snakemake.wildcards.layer),
        Path(snakemake.output[0]),
        structure=read_json(snakemake.input.structure),
        heldout_fraction=snakemake.params.collection["heldout_fraction"],
        dtype=snakemake.params.gram["dtype"],
    )


if __name__ == "__main__":
    script(main, snakemake)
