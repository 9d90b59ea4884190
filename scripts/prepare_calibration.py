"""Cut the windows of tokens that the model reads for calibration."""

from pathlib import Path

from cospadi.stage import script, without_torch


def main(snakemake, log):
    if snakemake.params.windows["source"] != "self":
        without_torch()
    from cospadi.calibration.windows import prepare_windows

    text = Path(snakemake.input.text[0]) if snakemake.input.text else None
    prepare_windows(Path(snakemake.input.model), snakemake.params.windows, text, Path(snakemake.output[0]), log=log)


if __name__ == "__main__":
    script(main, snakemake)
