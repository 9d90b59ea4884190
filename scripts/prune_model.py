"""Write the model without the removed blocks."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.files import read_json, write_json
    from cospadi.pruning.folding import prune, read_transforms
    from cospadi.structure import read_structure

    selection = read_json(snakemake.input.selection)
    fitted = list(snakemake.input.fitted)
    counts = prune(
        snakemake.input.model,
        read_structure(snakemake.input.structure),
        selection["removed"],
        snakemake.output.model,
        transforms=read_transforms(fitted[0]) if fitted else None,
        settings=snakemake.params.settings,
    )
    log(f"{len(selection['removed'])} blocks removed: {selection['removed']}")
    diagnostics = read_json(fitted[1]) if fitted else {"seconds": 0.0, "cuts": []}
    report = {**counts, "removed": selection["removed"]}
    write_json(snakemake.output.report, {**report, "seconds": diagnostics["seconds"], "fits": diagnostics["cuts"]})


if __name__ == "__main__":
    script(main, snakemake)
