"""Fetch the model as a Hugging Face folder."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.outside import remember_fetched
    from cospadi.sources import fetch_model

    fetch_model(snakemake.params.model, snakemake.output[0], log=log)
    remember_fetched(snakemake.output[0])


if __name__ == "__main__":
    script(main, snakemake)
