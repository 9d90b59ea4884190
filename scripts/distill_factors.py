"""Train the factors of all units of a variant together, against what the dense model predicts."""

from pathlib import Path

from cospadi.stage import choose_device, say, script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.distillation import distill
    from cospadi.structure import read_structure

    job, params, output = snakemake.input, snakemake.params, Path(snakemake.output[0])
    report = distill(
        Path(job.dense),
        Path(job.model),
        read_structure(job.structure),
        Path(job.windows),
        dict(zip(map(Path, job.factors), params.layers, strict=True)),
        params.variant,
        more=Path(job.more[0]) if job.more else None,
        calibration=calibration_of(job.windows, params.collection),
        output=output,
        saved=output.with_name("distilling.pt"),
        dtype=params.collection["dtype"],
        heldout_fraction=params.collection["heldout_fraction"],
        device=choose_device(params.device),
        log=log,
    )
    say(f"{snakemake.wildcards.variant}: {report['kl_before']:.4f} to {report['kl']:.4f} nats from the dense model")


if __name__ == "__main__":
    script(main, snakemake)
