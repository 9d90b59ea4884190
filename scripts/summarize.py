"""Write the table, the plots and the pages of a run."""

from pathlib import Path

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.report import summarize

    summarize(
        snakemake.params.run,
        Path(snakemake.output.table).parent,
        dense_model=Path(snakemake.input.model),
        units=snakemake.params.units,
        pruned=snakemake.params.pruned,
        rules=snakemake.params.rules,
        log=log,
    )


if __name__ == "__main__":
    script(main, snakemake)
