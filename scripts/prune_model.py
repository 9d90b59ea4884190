"""Write the model without the removed blocks."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.calibration.activations import calibration_of
    from cospadi.files import read_json, write_json
    from cospadi.pruning.folding import prune, read_transforms
    from cospadi.pruning.selection import provenance, read_selection
    from cospadi.structure import read_structure

    structure, settings = read_structure(snakemake.input.structure), snakemake.params.settings
    calibration = calibration_of(snakemake.input.windows, snakemake.params.walk)
    selection = read_selection(snakemake.input.selection, structure, settings, calibration)
    belongs = {**provenance(structure, settings), **calibration, "cuts": selection["cuts"]}
    fitted = list(snakemake.input.fitted)
    counts = prune(
        snakemake.input.model,
        structure,
        selection["removed"],
        snakemake.output.model,
        transforms=read_transforms(fitted[0], belongs) if fitted else None,
        settings=settings,
    )
    log(f"{len(selection['removed'])} blocks removed: {selection['removed']}")
    diagnostics = read_json(fitted[1]) if fitted else {"seconds": 0.0, "fits": []}
    report = {**counts, "removed": selection["removed"]}
    write_json(snakemake.output.report, {**report, "seconds": diagnostics["seconds"], "fits": diagnostics["fits"]})


if __name__ == "__main__":
    script(main, snakemake)
