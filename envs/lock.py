"""Write lock.txt, torch.txt, torch-cpu.txt, cospadi.yaml from what is installed here: `python envs/lock.py WHEEL...`.

Run it in an environment that has everything and has passed `make test`; all files then carry the same exact pins. `uv`
has to be on the PATH (`pip install uv`, in an environment of its own): it asks the package index for the checksums of
every file of a pin, so that each platform finds its own. What follows the command are wheels of torch's CPU build.

`torch` stands apart. Its CPU build is another file than the one on PyPI, which for Linux is built for CUDA and needs
3 GB of libraries beside it.
"""

import hashlib
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent
HEADER = "# {}. Written by `python envs/lock.py`; do not edit.\n"
ALL = HEADER.format("Exact versions of everything, tested together")
TORCH = HEADER.format("torch as PyPI has it, and all that it needs on every platform")
CPU = HEADER.format("torch built for CPUs, of https://download.pytorch.org/whl/cpu")


def pins() -> dict[str, str]:
    """Version of every installed package but this project, without local versions such as ``+cpu``."""
    versions = {dist.name.lower().replace("_", "-"): dist.version.partition("+")[0] for dist in distributions()}
    for name in ("cospadi-workflow", "pip"):
        versions.pop(name, None)
    return dict(sorted(versions.items()))


def hashed(versions: dict[str, str], *options: str) -> str:
    """Pins with the checksums of their files, as `pip install --require-hashes` reads them."""
    command = ["uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-annotate", "--no-header", *options, "-"]
    lines = "".join(f"{name}=={version}\n" for name, version in versions.items())
    return subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True, check=True).stdout


def conda(versions: dict[str, str]) -> str:
    """A conda environment with the same pins."""
    packages = "".join(f"      - {name}=={version}\n" for name, version in versions.items())
    return f"{ALL}channels:\n  - conda-forge\ndependencies:\n  - python =3.11\n  - pip\n  - pip:\n{packages}"


if __name__ == "__main__":
    found = pins()
    (HERE / "cospadi.yaml").write_text(conda(found))
    torch = {"torch": found.pop("torch")}
    (HERE / "lock.txt").write_text(ALL + hashed(found, "--no-deps"))
    (HERE / "torch.txt").write_text(
        TORCH + hashed(torch, "--universal", "--python-version=3.11", f"--constraints={HERE}/lock.txt")
    )
    hashes = [f" --hash=sha256:{hashlib.sha256(Path(wheel).read_bytes()).hexdigest()}" for wheel in sys.argv[1:]]
    (HERE / "torch-cpu.txt").write_text(f"{CPU}torch=={torch['torch']}+cpu{''.join(hashes)}\n")
