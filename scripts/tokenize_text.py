"""Turn the text into streams of tokens."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.training.text import tokenize

    tokenize(snakemake.input.tokenizer, snakemake.input.text, snakemake.input.heldout, snakemake.output[0], log=log)


if __name__ == "__main__":
    script(main, snakemake)
