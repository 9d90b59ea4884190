"""Plot the distances over every cut."""

from pathlib import Path

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.pruning.selection import read_distances
    from cospadi.report.plots import plot_distances
    from cospadi.structure import read_structure

    distances = read_distances(
        snakemake.input.distances,
        read_structure(snakemake.input.structure),
        samples=snakemake.params.samples,
        calibration=calibration_of(snakemake.input.windows, snakemake.params.walk),
    )
    plot_distances(distances, [Path(path) for path in snakemake.output])


if __name__ == "__main__":
    script(main, snakemake)
