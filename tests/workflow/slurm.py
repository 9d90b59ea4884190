"""A SLURM of one node for tests: real daemons with a configuration, key, ports and state of their own in one folder."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scancel", "sinfo")

# The node says it has four CPUs and 32 GB, so that several jobs run side by side on any machine.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
ReturnToService=2
SlurmctldTimeout=120
SlurmdTimeout=300
MessageTimeout=60
KillWait=2
MinJobAge=3600
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=32000 Gres=gpu:1
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP DefMemPerCPU=500
"""
# no control groups: a container owns none. Memory is watched by JobAcctGather instead.
_CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
_GRES = "Name=gpu File=/dev/zero\n"

Condition = Callable[[], object]


class Unavailable(Exception):
    """SLURM cannot run here; says why."""


@dataclass(frozen=True)
class Recorded:
    """A job as SLURM recorded it: what was asked for and how it ended."""

    id: int
    state: str
    cpus: int
    mem_mb: int
    gpus: int
    minutes: int
    seconds: float
    comment: str


def install() -> None:
    """Install SLURM from Debian's packages where it is missing.

    Raises
    ------
    Unavailable
        Without root, apt or a network.
    """
    if os.geteuid() != 0:
        raise Unavailable("SLURM's daemons need root here")
    if all(map(shutil.which, PROGRAMS)):
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"{', '.join(PACKAGES)} are not installed, and there is no apt-get to install them")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise Unavailable(f"apt-get {arguments[0]} failed: {done.stderr.strip()[-300:]}")


def wait_for(condition: Condition, seconds: float = 180.0, what: str = "") -> object:
    """Poll until a condition holds; its value. The limit is generous, the machine may be busy."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise TimeoutError(f"{what or condition} did not come true in {seconds:.0f} s")


class Cluster:
    """One node and its controller; `start` before use, `stop` after it."""

    def __init__(self) -> None:
        # not under pytest's folder: munge wants every folder above its socket to be open to all
        self.folder = Path(tempfile.mkdtemp(prefix="cospadi-slurm-"))
        self.folder.chmod(0o755)
        self._host = socket.gethostname().partition(".")[0]
        self.configuration = self.folder / "slurm.conf"
        self.environment = {
            "SLURM_CONF": str(self.configuration),
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def start(self) -> None:
        """Write the configuration and start munge, the controller and the node."""
        for name in ("state", "spool", "munge", "bin"):
            (self.folder / name).mkdir()
        ports = dict(zip(("controller_port", "node_port"), _free_ports(2), strict=True))
        self.configuration.write_text(_CONFIGURATION.format(folder=self.folder, host=self._host, **ports))
        (self.folder / "cgroup.conf").write_text(_CGROUP)
        (self.folder / "gres.conf").write_text(_GRES)
        # the plugin's job step drops SLURM_CONF from srun's environment; a cluster has it in /etc/slurm
        srun = self.folder / "bin/srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.configuration} exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        munge = self.folder / "munge"
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o600)
        options = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._run("munged", "--force", f"--socket={munge / 'socket'}", *options)
        self.start_controller()
        self._run("slurmd")
        wait_for(lambda: self._run("sinfo", "-h", "-o", "%T").strip() == "idle", what="an idle node")

    def start_controller(self) -> None:
        """Start the controller; what it knew before is read from the state folder."""
        self._run("slurmctld")
        wait_for(lambda: "UP" in self._run("scontrol", "ping", check=False), what="the controller")

    def stop_controller(self) -> None:
        """Stop the controller; jobs run on."""
        self._end("slurmctld", self.folder / "slurmctld.pid")

    def stop(self) -> None:
        """Cancel every job, end the daemons that were started here, by pid, and remove the folder."""
        self._run("scancel", "--user=root", check=False)
        pids = {"slurmd": "slurmd.pid", "slurmctld": "slurmctld.pid", "munged": "munge/pid"}
        for name, file in pids.items():
            self._end(name, self.folder / file)
        shutil.rmtree(self.folder)

    def jobs(self) -> list[Recorded]:
        """Every job since the start, in order of submission."""
        form = "JobID:|,State:|,tres-alloc:|,tres-per-job:|,TimeLimit:|,StartTime:|,EndTime:|,Comment:"
        lines = self._run("squeue", "--states=all", "--noheader", "-O", form).splitlines()
        return sorted((_recorded(line) for line in lines), key=lambda job: job.id)

    def completed(self) -> list[dict[str, str]]:
        """The lines of the job completion log, written by the controller as jobs end."""
        lines = (self.folder / "completed.txt").read_text().splitlines()
        return [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]

    def active(self, comment: str = "", state: str = "") -> list[Recorded]:
        """Jobs that wait or run, whose comment (the rule) and state contain these."""
        return [
            job
            for job in self.jobs()
            if job.state in ("PENDING", "RUNNING", "COMPLETING") and comment in job.comment and state in job.state
        ]

    def launched(self, comment: str) -> list[Recorded]:
        """Running jobs with this in their comment whose work has begun: their first job step is there."""
        steps = self._run("squeue", "--steps", "--noheader", "-o", "%i").split()
        return [job for job in self.active(comment, "RUNNING") if f"{job.id}.0" in steps]

    def cancel(self, job: Recorded) -> None:
        """``scancel`` a job."""
        self._run("scancel", str(job.id))

    def suspend(self, job: Recorded) -> None:
        """Stop a running job where it is; `resume` lets it go on."""
        self._run("scontrol", "suspend", str(job.id))

    def resume(self, job: Recorded) -> None:
        """Let a suspended job go on."""
        self._run("scontrol", "resume", str(job.id))

    def _run(self, *command: str, check: bool = True) -> str:
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    @staticmethod
    def _end(name: str, pid_file: Path) -> None:
        try:
            pid = int(pid_file.read_text())
            # a stale file may name somebody else's process
            if Path(f"/proc/{pid}/comm").read_text().strip() != name:
                return
            os.kill(pid, signal.SIGTERM)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return
        wait_for(lambda: not _alive(pid), 60, f"the end of {name}")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _recorded(line: str) -> Recorded:
    id, state, tres, gpus, limit, start, end, comment = line.split("|")
    resources = dict(part.split("=", 1) for part in tres.split(",") if "=" in part)
    return Recorded(
        id=int(id),
        state=state,
        cpus=int(resources.get("cpu", 0)),
        mem_mb=_megabytes(resources.get("mem", "0M")),
        gpus=int(gpus.rpartition(":")[2]) if "gpu" in gpus else 0,
        minutes=_minutes(limit),
        seconds=_seconds(end) - _seconds(start),
        comment=comment.strip(),
    )


def _megabytes(text: str) -> int:
    return round(float(text[:-1]) * {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}[text[-1]])


def _minutes(limit: str) -> int:
    """Minutes of ``[days-][hours:]minutes:seconds``."""
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours = parts[-3] if len(parts) == 3 else 0
    return 24 * 60 * int(days or 0) + 60 * hours + parts[-2]


def _seconds(stamp: str) -> float:
    return time.mktime(time.strptime(stamp, "%Y-%m-%dT%H:%M:%S")) if stamp != "N/A" else 0.0
