"""Write a compressed model as an ordinary dense one."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.checkpoint import densify

    densify(snakemake.input[0], snakemake.output[0])
    log(f"dense model in {snakemake.output[0]}")


if __name__ == "__main__":
    script(main, snakemake)
