"""Fit what makes up for the blocks of every cut."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.calibration.walk import Walk
    from cospadi.pruning.fitting import fit_transforms
    from cospadi.pruning.selection import read_selection

    walk, settings = Walk.of_job(snakemake, log), snakemake.params.settings
    calibration = calibration_of(snakemake.input.windows, snakemake.params.walk)
    fit_transforms(
        walk,
        read_selection(snakemake.input.selection, walk.structure, settings, calibration),
        settings,
        output=snakemake.output.transforms,
        diagnostics=snakemake.output.diagnostics,
    )


if __name__ == "__main__":
    script(main, snakemake)
