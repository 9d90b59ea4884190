"""Plot the distances over every cut."""

from pathlib import Path

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.files import read_json
    from cospadi.report.plots import plot_distances

    plot_distances(read_json(snakemake.input[0]), [Path(path) for path in snakemake.output])


if __name__ == "__main__":
    script(main, snakemake)
