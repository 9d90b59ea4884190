"""The variant that each matrix of another is taken from."""

from pathlib import Path

from cospadi.stage import choose_device, choose_dtype, script


def main(snakemake, log):
    from cospadi.choosing import Search, Target, choose_variants
    from cospadi.finished import Finished, stamps

    params, settings, windows = snakemake.params, snakemake.params.settings, Path(snakemake.input.windows)
    variants = {name: Path(folder) for name, folder in params.variants.items()}
    size, trials, search = settings.get("ratio"), settings.get("search"), None
    output, table, device = Path(snakemake.output.choice), Path(snakemake.output.table), choose_device(params.device)
    # what a swap changes is less than other dtypes round
    dtype = "float32" if trials else choose_dtype(params.dtype, device)[0]
    measured = [params.code, dtype, device, params.collection, stamps([windows, *map(Path, snakemake.input.codes)])]
    with Finished(output, measured) as finished:
        if size is None or trials:
            from cospadi.evaluation.parts import PartsModel, codes_of

            codes, fraction = codes_of(variants, params.units), params.collection["heldout_fraction"]
            model = PartsModel(Path(snakemake.input.model), windows, fraction, codes, device, dtype)
            search = Search(trials, finished.once(model.divergence), model.seed % 2**63) if trials else None
            size = size if trials else Target(settings["max_perplexity_increase"], finished.once(model.increase))
        choose_variants(variants, params.units, size, output, table=table, search=search, log=log)


if __name__ == "__main__":
    script(main, snakemake)
