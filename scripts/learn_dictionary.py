"""Learn the factors of every matrix of a unit."""

from pathlib import Path

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.files import read_json
    from cospadi.learning import learn_unit
    from cospadi.methods import METHODS
    from cospadi.structure import chosen

    learn, more = learn_unit, {"warm_factors": next(map(Path, snakemake.input.warm), None)}
    if snakemake.input.drift:
        learn, more = METHODS[snakemake.params.variant["method"]].learn_model, {"drift": Path(snakemake.input.drift[0])}
    learn(
        Path(snakemake.input.model),
        chosen(read_json(snakemake.input.structure), snakemake.params.variant["targets"]),
        [Path(file) for file in snakemake.input.gram],
        snakemake.params.layers,
        snakemake.params.variant,
        output=Path(snakemake.output.factors),
        diagnostics=Path(snakemake.output.diagnostics),
        device=choose_device(snakemake.params.device),
        log=log,
        **more,
    )


if __name__ == "__main__":
    script(main, snakemake)
