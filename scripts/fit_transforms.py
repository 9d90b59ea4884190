"""Fit what makes up for the blocks of every cut."""

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.files import read_json
    from cospadi.pruning.fitting import fit_transforms

    fit_transforms(
        snakemake.input.model,
        read_json(snakemake.input.structure),
        snakemake.input.windows,
        read_json(snakemake.input.selection),
        snakemake.params.settings,
        output=snakemake.output.transforms,
        diagnostics=snakemake.output.diagnostics,
        device=choose_device(snakemake.params.device),
        log=log,
        **snakemake.params.walk,
    )


if __name__ == "__main__":
    script(main, snakemake)
