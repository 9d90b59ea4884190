"""Drift of the predicted token's distribution over every block."""

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.files import read_json
    from cospadi.pruning.drift import measure

    measure(
        snakemake.input.model,
        read_json(snakemake.input.structure),
        snakemake.input.windows,
        snakemake.output[0],
        device=choose_device(snakemake.params.device),
        log=log,
        **snakemake.params.walk,
    )


if __name__ == "__main__":
    script(main, snakemake)
