"""Choose the blocks that go."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.files import write_json
    from cospadi.pruning.selection import choose
    from cospadi.structure import read_structure

    selection = choose(
        snakemake.input.distances,
        read_structure(snakemake.input.structure),
        snakemake.params.settings,
        samples=snakemake.params.samples,
        calibration=calibration_of(snakemake.input.windows, snakemake.params.walk),
    )
    log(f"cuts (first and last block): {selection['cuts']}")
    write_json(snakemake.output[0], selection)


if __name__ == "__main__":
    script(main, snakemake)
