"""Distances between the hidden states before and behind every possible cut."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.pruning.distances import measure
    from cospadi.pruning.walk import Walk

    measure(Walk.of_job(snakemake, log), snakemake.output[0], samples=snakemake.params.samples)


if __name__ == "__main__":
    script(main, snakemake)
