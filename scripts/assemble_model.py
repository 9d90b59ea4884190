"""Write a compressed model as a Hugging Face folder."""

from cospadi.stage import script, without_torch


def main(snakemake, log):
    without_torch()
    from cospadi.calibration.activations import calibration_of
    from cospadi.checkpoint import assemble, check_codes
    from cospadi.files import read_json

    reports = [matrix for file in snakemake.input.diagnostics for matrix in read_json(file)["matrices"].values()]
    errors = [report["relative_error"] for report in reports]
    mean = f"{sum(errors) / len(errors):.4f}" if errors else "none: every matrix stays as it is"
    calibration = calibration_of(snakemake.input.windows, snakemake.params.collection)
    check_codes(snakemake.input.model, snakemake.input.codes, snakemake.params.targets, calibration)
    assemble(
        snakemake.input.model,
        snakemake.input.codes,
        snakemake.output[0],
        variant=snakemake.params.variant,
        embedding_bits=snakemake.params.embedding[0],
        embedding_method=snakemake.params.embedding[1],
        head=next(iter(snakemake.input.head), None),
        calibration=calibration,
        card={"Mean relative error of the matrices": mean},
    )
    log(f"{len(reports)} matrices in {snakemake.output[0]}")


if __name__ == "__main__":
    script(main, snakemake)
