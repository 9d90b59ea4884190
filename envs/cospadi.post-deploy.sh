#!/usr/bin/env bash
# After `snakemake --sdm conda` has made the environment, run from the project's folder: the library itself.
python -m pip install --no-deps --no-build-isolation --editable .
