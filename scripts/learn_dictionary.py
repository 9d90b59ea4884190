"""Learn the factors of every matrix of a unit."""

from pathlib import Path

from cospadi.stage import choose_device, say, script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.learning import learn_unit
    from cospadi.profiles import read_allocation
    from cospadi.progress import progress
    from cospadi.structure import chosen, read_structure

    structure = chosen(read_structure(snakemake.input.structure), snakemake.params.variant["targets"])
    variant = snakemake.params.variant
    calibration = calibration_of(snakemake.input.windows, snakemake.params.collection)
    allocations = [read_allocation(Path(file), structure, variant, calibration) for file in snakemake.input.allocation]
    learn_unit(
        Path(snakemake.input.model),
        structure,
        [Path(file) for file in snakemake.input.gram],
        snakemake.params.layers,
        variant,
        calibration=calibration,
        gradient_files=[Path(file) for file in snakemake.input.gradients],
        output=Path(snakemake.output.factors),
        diagnostics=Path(snakemake.output.diagnostics),
        warm_factors=next(map(Path, snakemake.input.warm), None),
        drift=next(map(Path, snakemake.input.drift), None),
        allotted=next(iter(allocations), None),
        device=choose_device(snakemake.params.device),
        log=log,
    )
    say(f"{snakemake.wildcards.variant}: {progress(snakemake.output.diagnostics, len(structure['layers']))}")


if __name__ == "__main__":
    script(main, snakemake)
