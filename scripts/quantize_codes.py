"""Pack the factors of a unit as they go into the checkpoint."""

from pathlib import Path

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.quantization import quantize_unit
    from cospadi.structure import read_structure

    learned = Path(snakemake.input.factors)
    quantize_unit(
        Path(snakemake.input.model),
        read_structure(snakemake.input.structure),
        [Path(file) for file in snakemake.input.gram],
        next((Path(folder, learned.name) for folder in snakemake.input.distilled), learned),
        snakemake.params.layers,
        snakemake.params.variant,
        calibration=calibration_of(snakemake.input.windows, snakemake.params.collection),
        gradient_files=[Path(file) for file in snakemake.input.gradients],
        output=Path(snakemake.output.codes),
        diagnostics=Path(snakemake.output.diagnostics),
        code=snakemake.params.code,
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
