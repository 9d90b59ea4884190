"""Tensors of a unit, each from the variant that was chosen for it."""

from pathlib import Path

from cospadi.stage import script, without_torch


def main(snakemake, log):
    without_torch()
    from cospadi.choosing import Unit, take_unit

    take_unit(
        Path(snakemake.input.model),
        {name: Path(folder) for name, folder in snakemake.params.variants.items()},
        Path(snakemake.input.choice),
        snakemake.params.layers,
        snakemake.params.settings,
        Unit(Path(snakemake.output.learned), Path(snakemake.output.stored), Path(snakemake.output.codes)),
    )
    log(f"took the parts of {snakemake.output.codes}")


if __name__ == "__main__":
    script(main, snakemake)
