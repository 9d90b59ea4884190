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

    job, made, unit = snakemake.input, snakemake.output, (snakemake.params.layers, snakemake.params.variant)
    structure = chosen(read_structure(job.structure), unit[1]["targets"])
    calibration = calibration_of(job.windows, collection := snakemake.params.collection)
    allocations = [read_allocation(Path(file), structure, unit[1], calibration) for file in job.allocation]
    where = {"device": choose_device(snakemake.params.device), "log": log}
    edges = {"hidden_in": next(iter(job.get("streams", ())), None), "hidden_out": made.get("streams")}
    with handed_on(job.model, structure, job.windows, *unit, collection=collection, **edges, **where) as streams:
        learn_unit(
            *(Path(job.model), structure, [Path(file) for file in job.gram], *unit),
            calibration=calibration,
            gradient_files=[Path(file) for file in job.gradients],
            output=Path(made.factors),
            diagnostics=Path(made.diagnostics),
            warm_factors=next(map(Path, job.warm), None),
            drift=next(map(Path, job.drift), None),
            allotted=next(iter(allocations), None),
            streams=streams,
            **where,
        )
    say(f"{snakemake.wildcards.variant}: {progress(made.diagnostics, len(structure['layers']))}")


if __name__ == "__main__":
    script(main, snakemake)
