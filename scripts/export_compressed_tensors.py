"""Write a model of integers as a compressed-tensors folder."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.exports.compressed_tensors import export

    export(snakemake.input[0], snakemake.output[0], log=log)


if __name__ == "__main__":
    script(main, snakemake)
