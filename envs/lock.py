"""Write envs/lock.txt and envs/cospadi.yaml from the packages installed here: `python envs/lock.py`.

Run it in an environment that has everything and has passed `make test`; both files then carry the same exact pins.
"""

from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent
HEADER = """# Exact versions of everything, tested together. Written by `python envs/lock.py`; do not edit.
"""


def pins() -> list[str]:
    """``name==version`` of every installed package but this project, without local versions such as ``+cpu``."""
    versions = {dist.name.lower().replace("_", "-"): dist.version.partition("+")[0] for dist in distributions()}
    for name in ("cospadi-workflow", "pip"):
        versions.pop(name, None)
    return [f"{name}=={version}" for name, version in sorted(versions.items())]


def conda(lines: list[str]) -> str:
    """A conda environment with the same pins."""
    packages = "".join(f"      - {line}\n" for line in lines)
    return f"{HEADER}channels:\n  - conda-forge\ndependencies:\n  - python =3.11\n  - pip\n  - pip:\n{packages}"


if __name__ == "__main__":
    found = pins()
    (HERE / "lock.txt").write_text(HEADER + "".join(f"{line}\n" for line in found))
    (HERE / "cospadi.yaml").write_text(conda(found))
