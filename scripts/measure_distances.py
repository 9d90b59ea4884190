"""Distances between the hidden states before and behind every possible cut."""

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.files import read_json
    from cospadi.pruning.distances import measure

    measure(
        snakemake.input.model,
        read_json(snakemake.input.structure),
        snakemake.input.windows,
        snakemake.output[0],
        samples=snakemake.params.samples,
        device=choose_device(snakemake.params.device),
        log=log,
        **snakemake.params.walk,
    )


if __name__ == "__main__":
    script(main, snakemake)
