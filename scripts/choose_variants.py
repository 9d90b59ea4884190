"""The variant that each matrix of another is taken from."""

from pathlib import Path

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.choosing import Search, Target, choose_variants

    params, settings = snakemake.params, snakemake.params.settings
    variants = {name: Path(folder) for name, folder in params.variants.items()}
    size, trials, search = settings.get("ratio"), settings.get("search"), None
    if size is None or trials:
        from cospadi.evaluation.parts import PartsModel, codes_of

        windows, fraction = Path(snakemake.input.windows), params.collection["heldout_fraction"]
        codes, device = codes_of(variants, params.units), choose_device(params.device)
        # what a swap changes is less than other dtypes round
        dtype = "float32" if trials else params.dtype
        model = PartsModel(Path(snakemake.input.model), windows, fraction, codes, device, dtype)
        search = Search(trials, model.divergence, model.seed % 2**63) if trials else None
        size = size if trials else Target(settings["max_perplexity_increase"], model.increase)
    output, table = Path(snakemake.output.choice), Path(snakemake.output.table)
    choose_variants(variants, params.units, size, output, table=table, search=search, log=log)


if __name__ == "__main__":
    script(main, snakemake)
