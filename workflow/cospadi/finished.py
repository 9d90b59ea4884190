"""What a job has finished, kept on the disk as it comes: an interrupted job goes on behind it instead of anew."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from cospadi.errors import ArtifactError
from cospadi.files import TensorFile, write_tensors
from cospadi.provenance import digest_of
from cospadi.stage import Every

# Between two savings: what an interruption costs at most, besides what was worked on
SAVE_SECONDS = 30


class Result(NamedTuple):
    """JSON values and tensors."""

    about: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Finished:
    """Results of one job by name, in the order in which they came.

    A context: what is saved takes no memory, and is removed where the block succeeds, in which the job best writes its
    output, too.

    Parameters
    ----------
    output : Path or None
        File that the job writes; the results are in a hidden folder beside it. None: in memory alone.
    belongs : JSON values
        What decides the results. Those of anything else, and damaged ones, are not taken.
    """

    def __init__(self, output: Path | None, belongs: Any) -> None:
        self._folder = None if output is None else output.parent / f".{output.name}.finished"
        self._belongs = digest_of(belongs)
        self._results: dict[str, Result] = {}
        self._unsaved: list[str] = []
        self._n_files, self._due = 0, Every(SAVE_SECONDS)

    def __enter__(self) -> Self:
        if self._folder is not None and self._folder.is_dir():
            # one that is cut off, or of another job, ends it: what came before is good
            with contextlib.suppress(ArtifactError, KeyError, TypeError, ValueError):
                for path in sorted(self._folder.glob("*.safetensors")):
                    self._take(path)
            if not self._results:
                self._remove()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._remove()

    def __contains__(self, name: str) -> bool:
        return name in self._results

    def __getitem__(self, name: str) -> Result:
        return self._results[name]

    def __iter__(self) -> Iterator[tuple[str, Result]]:
        return iter(self._results.items())

    def left(self, groups: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
        """Those of some groups of matrices that have one without a result."""
        return [group for group in groups if not all(one.name in self for one in group)]

    def once(self, measure: Callable[[Any], float]) -> Callable[[Any], float]:
        """`measure` of JSON values, asked once for the same ones; its name tells it from others of the job."""

        def measured(given: Any) -> float:
            name = digest_of([measure.__name__, given])
            if name not in self:
                self.add(name, {"measured": measure(given)})
            return self[name].about["measured"]

        return measured

    def add(self, name: str, about: dict[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> None:
        """Add a result; its tensors have names of their own among all of the job."""
        self._results[name] = Result(about, dict(tensors or {}))
        self._unsaved.append(name)
        if self._due():
            self._save()

    def _save(self) -> None:
        if self._folder is None or not self._unsaved:
            return
        late = {name: self._results[name] for name in self._unsaved}
        header = {
            "belongs": self._belongs,
            "results": [[name, one.about, sorted(one.tensors)] for name, one in late.items()],
        }
        path = self._folder / f"{self._n_files:04d}.safetensors"
        write_tensors(path, {key: value for one in late.values() for key, value in one.tensors.items()}, header)
        self._take(path)
        self._unsaved = []

    def _take(self, path: Path) -> None:
        """Have the results of a file."""
        file = TensorFile(path)
        if file.metadata.get("belongs") != self._belongs:
            raise ArtifactError(path, "is of another job", "Delete its folder")
        for name, about, tensors in file.metadata["results"]:
            self._results[name] = Result(about, {key: file.read(key) for key in tensors})
        self._n_files += 1

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def stamps(paths: Iterable[Path]) -> list[list[Any]]:
    """What tells whether files were written again: names, sizes in bytes and times in ns."""
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
