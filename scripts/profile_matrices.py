"""What bytes are worth to every matrix of a unit."""

from pathlib import Path

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.profiles import profile_unit
    from cospadi.structure import chosen, read_structure

    profile_unit(
        Path(snakemake.input.model),
        chosen(read_structure(snakemake.input.structure), snakemake.params.variant["targets"]),
        [Path(file) for file in snakemake.input.gram],
        snakemake.params.layers,
        snakemake.params.variant,
        Path(snakemake.output[0]),
        calibration=calibration_of(snakemake.input.windows, snakemake.params.collection),
        gradient_files=[Path(file) for file in snakemake.input.gradients],
        device=choose_device(snakemake.params.device),
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
