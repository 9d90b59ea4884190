"""Digests: short names for the content of code and of files, by which Snakemake sees that something changed.

Snakemake sees changes of a rule's script and not of the modules that the script imports, and of a folder only its
time and not that a file in it was edited. So rules carry digests of both as parameters.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
# What a run takes from these is chosen by name in the config, and the chooser names the chosen module: their tables
# are no part of a digest, so a line more in one changes nothing that was there
REGISTRIES = {
    "cospadi.methods",
    "cospadi.pruning",
    "cospadi.runtime.cospadi_registry",
    "cospadi.solvers",
    "cospadi.sources",
}
# Estimates of memory and time decide nothing in an artifact
ESTIMATES = {"cospadi.work"}

# Files up to this size are hashed whole: half a second at most for all of a small model
_HASHED_WHOLE = 64 * 2**20
_PART = 2**20


@cache
def code_digest(*modules: str, without: str | None = None, data: str | None = None) -> str:
    """SHA-256 over the code of modules and of all modules of this package that they import.

    The code is the syntax tree without comments and docstrings. The import closure is found in the source (imports
    inside functions count); of a registry only what the caller names is part of it.

    Parameters
    ----------
    *modules : str
        Names, ``cospadi.gram``.
    without : str, optional
        A package whose modules do not count, because what they change is seen elsewhere.
    data : str, optional
        A folder of the package that the modules read, ``tasks``.
    """
    found: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        reached = module not in modules  # by an import; a registry that is named itself counts
        left_out = (reached and module in REGISTRIES | ESTIMATES) or (
            without and f"{module}.".startswith(f"{without}.")
        )
        if module not in found and not left_out:
            found[module], imports = _read(module)
            waiting += imports
    digest = hashlib.sha256()
    for module in sorted(found):
        digest.update(f"{module}\0".encode() + found[module])
    if data is not None:
        digest.update(folder_digest(PACKAGE / data).encode())
    return digest.hexdigest()


def modules_of(package: str) -> list[str]:
    """Names of a package's modules, itself included."""
    folder = PACKAGE.parent.joinpath(*package.split("."))
    return [package, *(f"{package}.{file.stem}" for file in sorted(folder.glob("*.py")) if file.stem != "__init__")]


def _source_file(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _read(module: str) -> tuple[bytes, list[str]]:
    """SHA-256 of a module's syntax tree, and the modules of this package that it imports anywhere in it."""
    tree = ast.parse(_source_file(module).read_bytes())
    package = module if _source_file(module).name == "__init__.py" else module.rpartition(".")[0]
    # what stands under `if TYPE_CHECKING` never runs
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*above, *([origin] if origin else [])])
            if origin.split(".")[0] == PACKAGE.name:
                submodules = [f"{origin}.{alias.name}" for alias in node.names]
                names += [name if _source_file(name).exists() else origin for name in submodules]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _drop_docstring(node)
    # a tree says nothing of lines and columns unless asked
    code = hashlib.sha256(ast.dump(tree).encode()).digest()
    return code, [name for name in names if name.startswith(f"{PACKAGE.name}.")]


def _drop_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    if ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:]


def files_digest(paths: Iterable[str | Path], root: str | Path = ".") -> str:
    """SHA-256 over names and contents of files; what does not exist counts as such.

    A file of at most 64 MiB counts with its bytes. A larger one, a shard of weights, counts with its size, its time
    and its first MiB, which holds the names and shapes of its tensors: to read 140 GB whenever jobs are planned would
    take minutes, and who writes into a file moves its time. A copy that keeps times is the same file.

    Parameters
    ----------
    paths : iterable of path-like
    root : path-like
        Names are relative to it, so that a folder that moved is the same folder.
    """
    digest = hashlib.sha256()
    for path in sorted(map(Path, paths)):
        name = path.relative_to(root) if path.is_relative_to(root) else path
        digest.update(f"{name}\0".encode())
        if path.is_file():
            status = path.stat()
            digest.update(_content(path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


@cache
def _content(path: Path, size: int, modified: int) -> bytes:
    with open(path, "rb") as file:
        if size <= _HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        return hashlib.sha256(f"{size} {modified}\0".encode() + file.read(_PART)).digest()


def folder_digest(folder: str | Path | None) -> str | None:
    """Digest of all files below a folder, None for no folder."""
    if folder is None:
        return None
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return files_digest(paths, folder)
