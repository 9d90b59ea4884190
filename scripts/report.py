"""Write Snakemake's own report, and beside it the complete config that it shows the results of."""

import subprocess
import sys
import tempfile

from cospadi.stage import script


def main(snakemake, log):
    import yaml

    with open(snakemake.output.config, "w") as file:
        yaml.safe_dump(snakemake.params.config, file, sort_keys=False, allow_unicode=True)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as outer:
        yaml.safe_dump(snakemake.params.outer, outer, sort_keys=False, allow_unicode=True)
        outer.flush()
        # the run that this job is part of is not finished: the report is asked for its results, not for itself
        command = [sys.executable, "-m", "snakemake", "--snakefile", snakemake.params.snakefile]
        command += ["--configfile", outer.name, "--workflow-profile", "none", "--nolock"]
        command += ["--report", snakemake.output.archive, "--", *snakemake.input]
        result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    if result.returncode:
        raise RuntimeError(f"snakemake --report failed: {result.stderr.strip()[-2000:]}")
    log(f"report in {snakemake.output.archive}")


if __name__ == "__main__":
    script(main, snakemake)
