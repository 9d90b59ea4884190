"""Fit what makes up for the blocks of every cut."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.calibration.walk import Walk
    from cospadi.files import read_json
    from cospadi.pruning.fitting import fit_transforms

    fit_transforms(
        Walk.of_job(snakemake, log),
        read_json(snakemake.input.selection),
        snakemake.params.settings,
        output=snakemake.output.transforms,
        diagnostics=snakemake.output.diagnostics,
    )


if __name__ == "__main__":
    script(main, snakemake)
