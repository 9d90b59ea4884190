"""Find the matrices of a model and what they read."""

from cospadi.stage import script


def main(snakemake, log):
    from cospadi.files import write_json
    from cospadi.structure import inspect_model

    structure = inspect_model(snakemake.input.model)
    matrices = sum(len(site["matrices"]) for layer in structure["layers"] for site in layer["sites"])
    log(f"{len(structure['layers'])} layers, {matrices} matrices")
    write_json(snakemake.output[0], structure)


if __name__ == "__main__":
    script(main, snakemake)
