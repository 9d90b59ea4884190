"""Write the table and the curves of models trained from scratch."""

from pathlib import Path

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.report.training import summarize_training

    results = Path(snakemake.output.table).parent
    summarize_training(snakemake.params.training, results / "training", results, log=log)


if __name__ == "__main__":
    script(main, snakemake)
