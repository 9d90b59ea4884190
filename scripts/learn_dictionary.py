"""Learn the factors of every matrix of a unit, on what the units before it give where the variant asks for that."""

from pathlib import Path

from cospadi.stage import choose_device, say, script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.learning import learn_unit
    from cospadi.profiles import read_allocation
    from cospadi.progress import progress
    from cospadi.structure import chosen, read_structure

    job, variant, collection = snakemake.input, snakemake.params.variant, snakemake.params.collection
    structure = chosen(read_structure(job.structure), variant["targets"])
    calibration = calibration_of(job.windows, collection)
    allocations = [read_allocation(Path(file), structure, variant, calibration) for file in job.allocation]
    device = choose_device(snakemake.params.device)
    streams = None
    if hasattr(snakemake.output, "streams"):
        from cospadi.sequence import Streams

        how = {"dtype": collection["dtype"], "batch_tokens": collection["batch_tokens"], "device": device, "log": log}
        before = next(map(Path, job.streams), None)
        streams = Streams(job.model, structure, job.windows, snakemake.params.layers, variant, hidden_in=before, **how)
    learn_unit(
        Path(job.model),
        structure,
        [Path(file) for file in job.gram],
        snakemake.params.layers,
        variant,
        calibration=calibration,
        gradient_files=[Path(file) for file in job.gradients],
        output=Path(snakemake.output.factors),
        diagnostics=Path(snakemake.output.diagnostics),
        warm_factors=next(map(Path, job.warm), None),
        drift=next(map(Path, job.drift), None),
        allotted=next(iter(allocations), None),
        streams=streams,
        device=device,
        log=log,
    )
    if streams is not None:
        streams.write(snakemake.output.streams)
    say(f"{snakemake.wildcards.variant}: {progress(snakemake.output.diagnostics, len(structure['layers']))}")


if __name__ == "__main__":
    script(main, snakemake)
