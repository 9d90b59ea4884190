"""What all scripts share: threads, log file, console, errors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest

from cospadi import stage
from cospadi.errors import ArtifactError


@pytest.fixture
def job(tmp_path, monkeypatch):
    for variable in stage._THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return SimpleNamespace(
        rule="learn", wildcards=["a", "layer_03"], threads=3, log=[str(tmp_path / "logs" / "learn.log")]
    )


def log_of(job) -> str:
    with open(job.log[0]) as file:
        return file.read()


@pytest.fixture
def console(monkeypatch, tmp_path):
    """What reaches the console, whatever the script redirects."""
    path = tmp_path / "console"
    with open(path, "w") as file:
        monkeypatch.setattr(sys, "__stderr__", file)
        yield path.read_text


def test_threads_are_set_before_main_runs(job):
    seen = {}
    stage.script(lambda _job, _log: seen.update(os.environ), job)
    assert {seen[variable] for variable in stage._THREAD_VARIABLES} == {"3"}
    assert "OPENBLAS_NUM_THREADS" in stage._THREAD_VARIABLES and "NUMBA_NUM_THREADS" in stage._THREAD_VARIABLES


def test_log_file_has_every_line_and_the_console_some(job, console):
    def main(_job, log):
        for number in range(50):
            log(f"iter {number}/50")

    stage.script(main, job)
    assert log_of(job).count("iter ") == 50
    assert console().splitlines() == ["[learn a layer_03] iter 0/50"]
    assert "done in" in log_of(job)


def test_a_job_says_how_much_memory_it_held_however_short(tmp_path):
    """In a process of its own, whose peak is no other test's."""
    program = f"""
from types import SimpleNamespace
from cospadi import stage
job = SimpleNamespace(rule="learn", wildcards=[], threads=1, log=["{tmp_path}/a.log"])
stage.script(lambda _job, _log: bytearray(300_000_000).count(1), job)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    most = stage.ended((tmp_path / "a.log").read_text().splitlines())
    assert 300e6 < most < 360e6
    assert stage.ended(["10:00:00 iter 3/5"]) is None and stage.ended([]) is None


def test_memory_is_known_without_proc_too(monkeypatch):
    def refuse(_path):
        raise FileNotFoundError

    known = stage.peak_memory()
    monkeypatch.setattr(stage.Path, "read_text", refuse)
    assert known == pytest.approx(stage.peak_memory(), rel=0.5)


def test_what_libraries_print_goes_to_the_log(job, console, capfd):
    def main(_job, _log):
        print("from print")
        print("from stderr", file=sys.stderr)
        warnings.warn("from a warning", stacklevel=1)

    stage.script(main, job)
    for line in ("from print", "from stderr", "from a warning"):
        assert line in log_of(job)
    assert console() == ""
    assert capfd.readouterr() == ("", "")


def test_an_error_is_one_message_on_the_console_and_whole_in_the_log(job, console):
    def main(_job, _log):
        raise ArtifactError("gram/layer_03.h5", "truncated", "Delete it and run again")

    with pytest.raises(SystemExit) as stop:
        stage.script(main, job)
    assert stop.value.code == 1
    assert console() == (
        "[learn a layer_03] ArtifactError: gram/layer_03.h5: truncated. Delete it and run again\n"
        f"  full traceback: {job.log[0]}\n"
    )
    assert "Traceback (most recent call last)" in log_of(job)
    assert "in main" in log_of(job)


def test_a_rule_without_a_log_file(job, console):
    job.log = []
    stage.script(lambda _job, log: log("hello"), job)
    assert console() == "[learn a layer_03] hello\n"


def test_device_is_chosen_without_torch_where_there_is_no_driver(monkeypatch):
    monkeypatch.setattr(stage, "has_gpu", lambda: False)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
    assert stage.choose_device("auto") == "cpu"
    assert stage.choose_device("cuda") == "cuda"


JOB = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from cospadi import stage

folder, name, gpu = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


def main(job, log):
    import os

    (folder / name).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    while not (folder / f"end {name}").exists():
        time.sleep(0.01)


job = {"rule": "learn", "wildcards": [], "threads": 1, "log": [str(folder / f"{name}.log")], "resources": {"gpu": gpu}}
stage.script(main, SimpleNamespace(**job))
"""


def test_jobs_that_run_at_once_have_a_gpu_each(tmp_path):
    """Devices are pretended: what a job sees as the only one is what no other running job sees."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0, GPU-8a6c,2", "TMPDIR": str(tmp_path)}
    running = {}

    def started(name: str, gpu: int = 1) -> str:
        command = [sys.executable, "-c", JOB, str(tmp_path), name, str(gpu)]
        running[name] = subprocess.Popen(command, env=environment)
        while not (tmp_path / name).exists() or not (tmp_path / name).read_text():
            assert running[name].poll() is None
            time.sleep(0.01)
        return (tmp_path / name).read_text()

    def end(name: str) -> None:
        (tmp_path / f"end {name}").touch()
        assert running.pop(name).wait() == 0

    try:
        seen = {name: started(name) for name in "abc"}
        assert sorted(seen.values()) == ["0", "2", "GPU-8a6c"]
        assert f"on GPU {seen['b']}\n" in (tmp_path / "b.log").read_text()
        end("b")
        assert started("d") == seen["b"]  # which none has now
        running["a"].kill()  # it had no chance to say that it ended
        running.pop("a").wait()
        assert started("e") == seen["a"]
        assert started("f") in seen.values()  # all have one: it is shared
        assert started("none", gpu=0) == environment["CUDA_VISIBLE_DEVICES"]
    finally:
        for name in list(running):
            end(name)


def test_a_job_that_asks_for_several_gpus_has_them_alone(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2,3", "TMPDIR": str(tmp_path)}
    running, seen = {}, {}
    try:
        for name, gpu in (("a", 1), ("b", 2), ("c", 1)):
            command = [sys.executable, "-c", JOB, str(tmp_path), name, str(gpu)]
            running[name] = subprocess.Popen(command, env=environment)
            while not (tmp_path / name).exists() or not (tmp_path / name).read_text():
                assert running[name].poll() is None
                time.sleep(0.01)
            seen[name] = (tmp_path / name).read_text()
        assert seen == {"a": "0", "b": "1,2", "c": "3"}
        assert "on GPU 1,2\n" in (tmp_path / "b.log").read_text()
    finally:
        for name, process in running.items():
            (tmp_path / f"end {name}").touch()
            assert process.wait() == 0


def test_more_gpus_than_there_are_is_all_of_them(monkeypatch, tmp_path):
    monkeypatch.setattr(stage.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(stage, "_held", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,2")
    assert stage.take_devices(3) == "4,2"
    assert len(stage._held) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,4,2")
    assert stage.take_devices(2) == "0,4"  # the free one, and one that is shared


def test_one_gpu_is_nothing_to_choose_from(monkeypatch, tmp_path):
    monkeypatch.setattr(stage.tempfile, "gettempdir", lambda: str(tmp_path))
    for told in ("3", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
        assert stage.take_devices() is None and os.environ["CUDA_VISIBLE_DEVICES"] == told
    assert list(tmp_path.iterdir()) == []


CPUINFO = {
    "flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile": ("bfloat16", "AMX and AVX512-BF16"),
    "Features\t: fp asimd bf16 i8mm": ("bfloat16", "Arm's bfloat16"),
    "flags\t\t: fpu avx2 fma f16c": ("float32", "the processor has no bfloat16 instructions"),
    "flags\t\t: fpu avx2 avx512f avx512bw avx512_vnni amx_tile": ("float32", "the processor has no bfloat16"),
    "model name\t: riscv": ("float32", "unknown"),
}


@pytest.mark.parametrize("line", CPUINFO)
def test_auto_is_bfloat16_where_linux_says_that_the_processor_has_it(line, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(stage.Path, "read_text", lambda path: f"processor\t: 0\n{line}\nbugs\t: bf16 avx512_bf16\n")
    dtype, reason = stage.choose_dtype("auto", "cpu")
    assert dtype == CPUINFO[line][0] and CPUINFO[line][1] in reason
    assert stage.choose_dtype("float16", "cpu") == ("float16", "the config asks for it")


@pytest.mark.parametrize(("answer", "dtype"), [("1\n", "bfloat16"), ("0\n", "float32"), ("", "float32")])
def test_auto_on_a_mac_asks_sysctl(answer, dtype, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=answer))
    assert stage.choose_dtype("auto", "cpu")[0] == dtype


@pytest.mark.parametrize("error", [FileNotFoundError("no /proc"), PermissionError("sandbox")])
def test_auto_is_float32_where_the_processor_cannot_be_asked(error, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(stage.Path, "read_text", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    assert stage.choose_dtype("auto", "cpu")[0] == "float32"


def test_auto_on_a_gpu_counts_only_what_it_computes_natively(monkeypatch):
    import contextlib

    import torch

    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        # an old GPU emulates it, and says that it is supported where emulation counts
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, n=native: n or including_emulation
        )
        assert stage.choose_dtype("auto", "cuda:0")[0] == ("bfloat16" if native else "float32")


@pytest.mark.parametrize("module", ["cospadi.stage", "cospadi.learning", "cospadi.gram", "cospadi.quantization"])
def test_jobs_of_one_layer_start_without_torch(module):
    program = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_stage_itself_imports_no_numerical_library():
    program = "import sys, cospadi.stage; print([m for m in ('numpy', 'scipy', 'h5py') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_a_full_disk_of_the_log_does_not_stop_the_job(job, console):
    job.log = ["/dev/full"]
    done = []
    stage.script(lambda _job, log: done.append([log("a line"), print("printed"), log("another")]), job)
    assert done
    lines = [line for line in console().splitlines() if "lost" in line]
    assert len(lines) == 1 and "lines of the log are lost: /dev/full: the disk is full" in lines[0]


def test_a_log_that_cannot_be_made_is_said_and_the_job_runs(job, console, tmp_path):
    (tmp_path / "file").write_text("")
    job.log = [str(tmp_path / "file" / "learn.log")]
    done = []
    stage.script(lambda _job, _log: done.append(1), job)
    assert done and "there is no log:" in console()


def test_an_error_of_the_machine_is_shown_with_its_remedy(job, console):
    def main(_job, _log):
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(SystemExit):
        stage.script(main, job)
    assert "the disk is full" in console() and "Free space" in console() and "Errno" not in console()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_not_taken_from_the_system_again():
    """Page faults of filling 64 MiB again, which are 16384 where the system gave new pages."""
    program = """
import resource, numpy as np
from cospadi.stage import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
given_back = faults()
keep_freed_memory()
faults()
print(given_back, faults())
"""
    # without huge pages, of which a few would do
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    given_back, kept = map(int, done.stdout.split())
    assert kept < 100 < given_back
