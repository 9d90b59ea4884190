"""Errors of the Hugging Face hub, turned into what the user does about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cospadi.errors import ArtifactError
from cospadi.registry import option

REVISION = option(
    "string",
    "Branch, tag or commit; a commit makes the run repeatable.",
    pattern=r"^\S+$",
    maxLength=100,
    default="main",
)

_OFFLINE = (
    "Run this step where the hub can be reached (on a cluster: the login node), unset HF_HUB_OFFLINE, or bring the "
    "files here by other means and use model.source: local, text.source: jsonl"
)


@contextlib.contextmanager
def explaining_hub_errors(repo: str, revision: str, target: str | Path) -> Iterator[None]:
    """Turn every way a download can fail into one ArtifactError with its remedy.

    Parameters
    ----------
    repo : str
        Name on the hub.
    revision : str
    target : path-like
        What is being made; errors name it.
    """
    from huggingface_hub import errors

    name = f"{repo} (revision {revision})"
    try:
        yield
    # the order matters: a gated repository is also a "repository not found"
    except errors.GatedRepoError as error:
        problem = f"the hub gives {name} only to users who accepted its licence"
        remedy = f"Accept it at https://huggingface.co/{repo}, then run `hf auth login` with a token of that account"
        raise ArtifactError(target, problem, remedy) from error
    except errors.RevisionNotFoundError as error:
        raise ArtifactError(target, f"{repo} has no revision {revision}", "Correct `revision` in the config") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        problem = f"the hub has no {name}, or it is private"
        raise ArtifactError(target, problem, "Correct the name in the config, or run `hf auth login`") from error
    except errors.LocalEntryNotFoundError as error:
        raise ArtifactError(target, f"{name} is not in the cache and the hub cannot be reached", _OFFLINE) from error
    except errors.EntryNotFoundError as error:
        raise ArtifactError(target, f"{name} lacks a file ({error})", "Choose a repository that has it") from error
    # HTTPError is that of the HTTP library which the hub's client happens to use
    except (errors.OfflineModeIsEnabled, errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise ArtifactError(target, f"the hub did not answer for {name} ({error})", _OFFLINE) from error
