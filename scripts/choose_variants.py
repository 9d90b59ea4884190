"""The variant that each matrix of another is taken from."""

from pathlib import Path

from cospadi.stage import choose_device, script


def main(snakemake, log):
    from cospadi.choosing import Target, choose_variants

    params, settings = snakemake.params, snakemake.params.settings
    variants = {name: Path(folder) for name, folder in params.variants.items()}
    size = settings.get("ratio")
    if size is None:
        from cospadi.evaluation.parts import PartsModel, codes_of

        windows, fraction = Path(snakemake.input.windows), params.collection["heldout_fraction"]
        codes, device = codes_of(variants, params.units), choose_device(params.device)
        model = PartsModel(Path(snakemake.input.model), windows, fraction, codes, device)
        size = Target(settings["max_perplexity_increase"], model.increase)
    output, table = Path(snakemake.output.choice), Path(snakemake.output.table)
    choose_variants(variants, params.units, size, output, table=table, log=log)


if __name__ == "__main__":
    script(main, snakemake)
