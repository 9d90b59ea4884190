#!/usr/bin/env bash
# After `snakemake --sdm conda` has made the environment: the library itself, from the folder of the project, in which
# Snakemake runs. Where the workflow is a module of another, COSPADI_SOURCE names that folder, or git+https://...
python -m pip install --no-deps --no-build-isolation ${COSPADI_SOURCE:---editable .}
