"""Learn the factors of every matrix of a unit, on what the units before it give where the variant asks for that."""

from pathlib import Path

from cospadi.stage import choose_device, say, script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.handing import handed_on
    from cospadi.learning import learn_unit
    from cospadi.profiles import read_allocation
    from cospadi.progress import progress
    from cospadi.structure import chosen, read_structure

    job, made, params = snakemake.input, snakemake.output, snakemake.params
    structure, variant = chosen(read_structure(job.structure), params.variant["targets"]), params.variant
    calibration = calibration_of(job.windows, params.collection)
    how = {"device": choose_device(params.device), "log": log}
    unit = job.model, structure, job.windows, params.layers, variant
    with handed_on(unit, params.collection, job, made, **how) as streams:
        learn_unit(
            *(Path(job.model), structure, [Path(file) for file in job.gram], params.layers, variant),
            calibration=calibration,
            gradient_files=[Path(file) for file in job.gradients],
            output=Path(made.factors),
            diagnostics=Path(made.diagnostics),
            warm_factors=next(map(Path, job.warm), None),
            drift=next(map(Path, job.drift), None),
            allotted=next((read_allocation(one, structure, variant, calibration) for one in job.allocation), None),
            streams=streams,
            code=params.code,
            **how,
        )
    say(f"{snakemake.wildcards.variant}: {progress(made.diagnostics, len(structure['layers']))}")


if __name__ == "__main__":
    script(main, snakemake)
