"""Which matrix of a variant gets how many bytes."""

from pathlib import Path

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.profiles import allocate
    from cospadi.structure import read_structure

    allocate(
        [Path(file) for file in snakemake.input.profiles],
        read_structure(snakemake.input.structure),
        snakemake.params.units,
        snakemake.params.variant,
        Path(snakemake.output.allocation),
        table=Path(snakemake.output.table),
        calibration=calibration_of(snakemake.input.windows, snakemake.params.collection),
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
