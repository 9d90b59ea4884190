"""Fetch the text, split into calibration and held-out articles."""

from pathlib import Path

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.sources import fetch_text

    folder = Path(snakemake.output.calibration).parent
    fetch_text(snakemake.params.text, folder, model=next(iter(snakemake.input.model), None), log=log)


if __name__ == "__main__":
    script(main, snakemake)
