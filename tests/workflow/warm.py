"""Starts Snakemake for each line of its input, and imports it once, with most of what jobs import.

A line is a JSON object: ``arguments`` of Snakemake, ``environment``, ``project`` whose Snakefile runs, and the file
``output`` for what it prints. The answer to a line is Snakemake's exit status. Each start is a fork, and each job is a
fork of that: nothing of one is seen by another.

Nearly all of a tiny job's seconds go into importing torch and transformers, and a run of the tests has hundreds of
them. The run of test_run.py that others copy starts as a user's does, and so do the runs that are killed.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import snakemake.cli
from snakemake.benchmark import benchmarked
from snakemake.script import PythonScript

_IMPORTED = """
    cospadi.runs
    lm_eval.evaluator lm_eval.models.huggingface
    matplotlib.backends.backend_agg matplotlib.backends.backend_svg
    transformers.models.auto.tokenization_auto transformers.models.llama.modeling_llama
"""


def prepare() -> None:
    """Import what forks need of other packages; each project has a cospadi of its own."""
    for name in _IMPORTED.split():
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "cospadi"]:
        del sys.modules[name]
    gc.freeze()


def run_job(script: PythonScript, path: str, edit: bool = False) -> None:
    """In place of `PythonScript.execute_script`: run a script in a fork, measured as a process of its own is."""
    job = os.fork()
    if job == 0:
        status = 1
        try:
            # other threads may have held the locks of the old ones
            for number, name in ((1, "stdout"), (2, "stderr")):
                file = open(number, "w", buffering=1, closefd=False)  # noqa: SIM115
                setattr(sys, name, file)
                setattr(sys, f"__{name}__", file)
            sys.argv = [path]
            runpy.run_path(path, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    with benchmarked(job, script.bench_record) if script.bench_record else contextlib.nullcontext():
        status = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
    if status:
        raise subprocess.CalledProcessError(status, path)


def start(job: dict) -> int:
    """Snakemake from its arguments to its exit status."""
    os.setsid()
    signal.alarm(600)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.path.insert(0, str(Path(job["project"], "workflow")))
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(source, target)
    PythonScript.execute_script = run_job
    sys.argv = ["snakemake", *job["arguments"]]
    return snakemake.cli.main()


if __name__ == "__main__":
    prepare()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            sys.exit(start(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
