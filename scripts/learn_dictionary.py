"""Learn the factors of every matrix of a unit."""

from pathlib import Path

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.files import read_json
    from cospadi.learning import learn_unit

    learn_unit(
        Path(snakemake.input.model),
        read_json(snakemake.input.structure),
        [Path(file) for file in snakemake.input.gram],
        snakemake.params.layers,
        snakemake.params.variant,
        output=Path(snakemake.output.factors),
        diagnostics=Path(snakemake.output.diagnostics),
        device=choose_device(snakemake.params.device),
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
