"""Starts Snakemake for each line of its input, and imports it once.

A line is a JSON object: ``arguments`` of Snakemake, ``environment``, ``project`` whose Snakefile runs, and the file
``output`` for what it prints. The answer to a line is Snakemake's exit status. Each start is a fork, so nothing of one
is seen by the next; jobs are started by Snakemake as ever.
"""

import json
import os
import signal
import sys
from pathlib import Path

import snakemake.cli

import cospadi.runs  # for what it imports of other packages; each project has a cospadi of its own

for name in [name for name in sys.modules if name.split(".")[0] == "cospadi"]:
    del sys.modules[name]
del cospadi

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

os.setsid()
signal.alarm(600)
os.environ.clear()
os.environ.update(job["environment"])
sys.path.insert(0, str(Path(job["project"], "workflow")))
file = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
nothing = os.open(os.devnull, os.O_RDONLY)
for target, source in ((0, nothing), (1, file), (2, file)):
    os.dup2(source, target)
sys.argv = ["snakemake", *job["arguments"]]
sys.exit(snakemake.cli.main())
