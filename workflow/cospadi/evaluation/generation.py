"""Text that a model writes, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cospadi.evaluation.placement import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[str],
    max_new_tokens: int = 40,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Continue every prompt greedily, all of them in one batch.

    Parameters
    ----------
    model, tokenizer
        As loaded by transformers.
    prompts : sequence of str
    max_new_tokens : int
    chat : bool
        Put the prompt through the chat template, if the tokenizer has one.

    Returns
    -------
    list of dict
        ``prompt``, ``text`` (what the model added), ``n_tokens`` and ``chat`` (whether the template was used).
    """
    chat = chat and tokenizer.chat_template is not None
    texts = list(prompts)
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts
        ]
    # the chat template writes its own special tokens
    rows = [tokenizer.encode(text, add_special_tokens=not chat) for text in texts]
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops, tokenizer.eos_token_id} - {None}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    length, device = max(map(len, rows)), input_device(model)
    # padded on the left, so that all prompts end where generation begins
    ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    with torch.inference_mode():
        grown = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=padding,
        )
    samples = []
    for prompt, new in zip(prompts, grown[:, length:].tolist(), strict=True):
        end = next((i for i, token in enumerate(new) if token in stops), len(new))
        text = tokenizer.decode(new[:end], skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text, "n_tokens": end, "chat": chat})
    return samples
