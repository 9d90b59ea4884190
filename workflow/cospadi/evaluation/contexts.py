"""Continuations of one context, read through the model together: the context once, in place of once for each of them.

A question with four answers is four requests of lm-eval that begin alike, and most of their tokens are the question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Forward = Callable[..., Any]


class Request(NamedTuple):
    """Ids: what was read before, at least one, and what is scored, at least one."""

    context: list[int]
    continuation: list[int]


def groups_of(requests: Sequence[Request], max_length: int) -> list[list[int]]:
    """Places of the requests that can be scored here, those of one context together, longest first.

    One that is longer than `max_length` ids, and the one after them, is left out: each begins elsewhere.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (context, continuation) in enumerate(requests):
        if len(context) + len(continuation) <= max_length + 1:
            groups.setdefault(tuple(context), []).append(place)
    return sorted(groups.values(), key=lambda places: -len(requests[places[0]].context))


@torch.inference_mode()
def score(forward: Forward, requests: Sequence[Request], device: torch.device | str) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, in nats, and whether it is what the model would write.

    Parameters
    ----------
    forward : callable
        The model: ``forward(ids, logits_to_keep=..., ...)``, ids (batch, length).
    requests : sequence of Request
        All of one context.
    device : device
        Of the ids.
    """
    context = requests[0].context
    answers = [one.continuation for one in requests]
    if len(requests) == 1:
        ids = torch.tensor([[*context, *answers[0][:-1]]], device=device)
        return [_scored(forward(ids, use_cache=False, logits_to_keep=len(answers[0])).logits[0], answers[0])]
    longest = max(map(len, answers)) - 1
    read = forward(torch.tensor([context], device=device), use_cache=longest > 0, logits_to_keep=1)
    first, rest = read.logits[0], []
    if longest:
        # what is behind an answer is seen by none of its own ids
        ids = torch.tensor([[*one[:-1], *[0] * (longest + 1 - len(one))] for one in answers], device=device)
        read.past_key_values.batch_repeat_interleave(len(answers))
        rest = forward(ids, past_key_values=read.past_key_values, use_cache=True, logits_to_keep=0).logits
    return [
        _scored(torch.cat([first, rest[row, : len(one) - 1]]) if longest else first, one)
        for row, one in enumerate(answers)
    ]


def _scored(logits: torch.Tensor, ids: list[int]) -> tuple[float, bool]:
    """Of logits (tokens, vocabulary) that predict as many ids."""
    # a bfloat16 log-softmax would round to 3 digits
    found = logits.log_softmax(-1, dtype=torch.float32)
    wanted = torch.tensor(ids, device=logits.device)
    return float(found.gather(1, wanted[:, None]).sum()), bool((found.argmax(-1) == wanted).all())
