"""Drift of the predicted token's distribution over every block."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.calibration.walk import Walk
    from cospadi.pruning.drift import measure

    measure(Walk.of_job(snakemake, log), snakemake.output[0])


if __name__ == "__main__":
    script(main, snakemake)
