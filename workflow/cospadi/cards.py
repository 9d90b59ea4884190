"""Cards: what the folder of a model says about itself, for people and for the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from cospadi.files import ModelFolder
from cospadi.runtime.cospadi_format import EMBEDDING, HEAD, TRANSFORMERS
from cospadi.runtime.cospadi_registry import CODECS

_HEAD = """\
---
{{ header }}
---
# {{ origin.base_model }}{{ title }} by CoSpaDi Workflow

{{ what }}

- Base model: {{ origin.base_model }}
- Licence of the base model: {{ origin.license or "not found, see the base model" }}
"""

_PACKED = """\
- Variant: `{{ variant }}`

| | bytes |
|---|---:|
| packed matrices in the files | {{ "{:,}".format(count.nbytes) }} |
| the same matrices dense in bfloat16 | {{ "{:,}".format(count.dense_nbytes) }} |
| removed | {{ "%.2f" % (100 * count.ratio) }} % |
| all weight files | {{ "{:,}".format(weights) }} |
{% if measured %}

| measured | |
|---|---:|
{% for label, value in measured.items() %}
| {{ label }} | {{ value }} |
{% endfor %}
{% endif %}

Load it with transformers {{ transformers }} or newer alone (the folder holds the code):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ name }}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{{ name }}", trust_remote_code=False)  # needs no code
```

With `import cospadi` first, the flag is not needed. On CPUs without bfloat16 instructions (most laptops) \
load with `dtype=torch.float32`: the packed tensors stay as small as in the file, and the model is faster.
"""

_PRUNED = """\
- Blocks removed, numbered from 0: {{ removed | join(", ") }}
- Step: `{{ settings }}`

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ name }}")
tokenizer = AutoTokenizer.from_pretrained("{{ name }}")
```
"""


def packed_card(
    base: ModelFolder,
    name: str,
    packing: Mapping[str, Any],
    count: Mapping[str, Any],
    weights: int,
    measured: Mapping[str, Any] | None,
) -> str:
    """``README.md`` of a packed checkpoint.

    Parameters
    ----------
    base : ModelFolder
        The model that was packed.
    name : str
        Of the folder.
    packing : mapping
        ``quantization_config`` of the checkpoint.
    count : mapping
        From `checkpoint.target_bytes`.
    weights : int
        Bytes of all weight files.
    measured : mapping, optional
        Label to figure.
    """
    return _rendered(
        _PACKED,
        base,
        "compression",
        ", packed",
        f"{len(packing['matrices'].keys() - {EMBEDDING, HEAD})} weight matrices are stored as dictionary times codes, "
        f"`W = D S`. {_embedding_words(packing)}All other tensors are the base model's.",
        name=name,
        variant=json.dumps(packing["variant"], sort_keys=True),
        count=count,
        weights=weights,
        measured=measured,
        transformers=TRANSFORMERS,
    )


def _embedding_words(packing: Mapping[str, Any]) -> str:
    spec = packing["matrices"].get(EMBEDDING)
    if spec is None:
        return ""
    codec = spec["codes"]["codec"]
    return f"Embedding and head are `{codec}`, {'entropy-coded' if CODECS[codec].variable else 'under scales'}. "


def pruned_card(base: ModelFolder, name: str, removed: Sequence[int], settings: Mapping[str, Any]) -> str:
    """``README.md`` of an ordinary model that lost the blocks `removed` by the step `settings`."""
    return _rendered(
        _PRUNED,
        base,
        "pruning",
        f" without {len(removed)} blocks,",
        "An ordinary model of fewer layers; it loads with transformers alone.",
        name=name,
        removed=removed,
        settings=json.dumps(settings, sort_keys=True),
    )


def origin_card(base: ModelFolder) -> str:
    """``ORIGIN.md``, as far as the model's folder tells."""
    origin = origin_of(base)
    return (
        f"- Base model: {origin['base_model']}\n- Licence: {origin.get('license', 'not found, see the base model')}\n"
    )


def origin_of(base: ModelFolder) -> dict[str, str]:
    """Name and licence of the base model, from what its folder says about itself."""
    said: dict[str, str] = {}
    origin = base.path / "ORIGIN.md"
    if origin.exists():
        for line in origin.read_text().splitlines():
            label, colon, value = line.removeprefix("- ").partition(": ")
            if colon:
                said[label] = value
    card = base.path / "README.md"
    if card.exists():
        _, _, rest = card.read_text(errors="replace").partition("---\n")
        for line in rest.partition("\n---")[0].splitlines():
            label, colon, value = line.partition(": ")
            if colon and label == "license":
                said["license"] = value.strip().strip("\"'")
    known = {
        "base_model": said.get("Base model") or base.config.get("_name_or_path") or base.path.resolve().name,
        "license": said.get("license") or said.get("Model licence") or said.get("Licence"),
    }
    return {key: value for key, value in known.items() if value}


def _rendered(template: str, base: ModelFolder, tag: str, title: str, what: str, **values: Any) -> str:
    from huggingface_hub import ModelCardData

    origin = origin_of(base)
    header = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["cospadi", tag], **origin
    ).to_yaml()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    page = environment.from_string(_HEAD + template)
    return page.render(header=header, origin=origin, title=title, what=what, **values)
