"""Write a compressed model as one GGUF file."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.exports.gguf import export

    export(snakemake.input[0], snakemake.output[0], kind=snakemake.wildcards.kind, log=log)


if __name__ == "__main__":
    script(main, snakemake)
