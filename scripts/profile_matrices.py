"""What bytes are worth to every matrix of a unit."""

from pathlib import Path

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.methods.base import MEASURED
    from cospadi.profiles import profile_unit
    from cospadi.structure import chosen, read_structure

    job, params, variant = snakemake.input, snakemake.params, snakemake.params.variant
    structure, device, measure = read_structure(job.structure), choose_device(params.device), None
    if variant["allocation"] == MEASURED:
        from cospadi.calibration.alone import Alone

        how = {"n_windows": variant["measured_windows"], "device": device, "log": log}
        how |= {key: params.collection[key] for key in ("batch_tokens", "heldout_fraction")}
        measure = Alone(job.model, structure, job.windows, params.layers[0], **how)
    profile_unit(
        Path(job.model),
        chosen(structure, variant["targets"]),
        [Path(file) for file in job.gram],
        params.layers,
        variant,
        Path(snakemake.output[0]),
        calibration=calibration_of(job.windows, params.collection),
        gradient_files=[Path(file) for file in job.gradients],
        measure=measure,
        code=params.code,
        device=device,
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
