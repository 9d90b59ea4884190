"""Make a tokenizer from the text."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.training.text import train_tokenizer

    train_tokenizer(snakemake.input[0], snakemake.output[0], vocabulary=snakemake.params.vocabulary, log=log)


if __name__ == "__main__":
    script(main, snakemake)
