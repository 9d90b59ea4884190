"""Choose the blocks that go."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.files import read_json, write_json
    from cospadi.pruning.selection import select

    selection = select(snakemake.params.settings, read_json(snakemake.input[0]))
    log(f"cuts (first and last block): {selection['cuts']}")
    write_json(snakemake.output[0], selection)


if __name__ == "__main__":
    script(main, snakemake)
