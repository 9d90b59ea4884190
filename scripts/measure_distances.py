"""Distances between the hidden states before and behind every possible cut."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.calibration.walk import Walk
    from cospadi.pruning.distances import measure

    measure(Walk.of_job(snakemake, log), snakemake.output[0], samples=snakemake.params.samples)


if __name__ == "__main__":
    script(main, snakemake)
