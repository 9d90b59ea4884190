"""Write a model with shared attention weights as an ordinary one."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.training import write_ordinary

    write_ordinary(snakemake.input[0], snakemake.output[0])
    log(f"ordinary model in {snakemake.output[0]}")


if __name__ == "__main__":
    script(main, snakemake)
