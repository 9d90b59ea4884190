"""New: a config that fits a model and this machine, written from the model's ``config.json``.

``python -m cospadi.new MODEL`` (`make new MODEL=...`), with a Hugging Face folder or a name on the hub.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cospadi.errors import ArtifactError, ConfigError, CospadiError
from cospadi.files import replacing
from cospadi.machine import read_machine
from cospadi.plan import Plan
from cospadi.resources import Shapes
from cospadi.runs import plan_run
from cospadi.sources import planning_config
from cospadi.stage import choose_device, choose_dtype
from cospadi.structure import PARTS, check_supported
from cospadi.tokenizer import has_chat_template
from cospadi.work import Work

GIGA = 1e9
# Tokens that the paper calibrates with, and the demo; the second moments of many inputs need more of them
MOST_TOKENS, LEAST_TOKENS, TOKENS_AN_INPUT = 256 * 1024, 32 * 1024, 16
# A job starts in some seconds: it should learn for longer than that
SECONDS_A_JOB = 30.0
# Part of the memory, and of the free disk, that one job may take
SHARE = 0.5

_TEMPLATE = """\
# {name}: {architecture}, {layers} layers, hidden size {hidden}, {parameters:.3g} billion parameters,
# {touched:.0%} of them in the matrices that are made smaller; {heads}; embeddings are {embeddings}.
# Written by `make new` for {cores} cores and {memory:.0f} GB of memory. Every key: docs/configuration.md.
#   make run CONFIG={file}       make status CONFIG={file}

{run}

model:
{model}

text:{text_comment}
{text}

calibration:
  source: {source}{source_comment}
  samples: {samples} # windows; {tokens} tokens in all, {per_input} for each input of the widest matrix ({widest})
  length: {length} # tokens a window; the model has {positions} positions
  mode: {mode} # {mode_comment}
  blocks_per_job: {blocks} # layers a collection job: {collect}
  batch_tokens: {batch}
  dtype: auto # {dtype} on this machine: {reason}

device: auto # {device} on this machine

layers_per_job: {per_job} # layers a learning job: about {learn_seconds:.0f} s and {learn}

variants: # dense, the model as it is, is always evaluated too
  ours-40: # single weights beside a few learned atoms; 0.4 of the matrices' bytes go
    method: hybrid
    ratio: 0.4
    share_within: {same_input} # they read the same input: atoms are stored once
    # embedding_bits: 8 # embedding and head in 8 bits as well: half of their bytes, for next to nothing
  sparsegpt-40: # a strong and fast rival at equal bytes
    method: sparsegpt
    ratio: 0.4
  cospadi-20:
    method: cospadi
    ratio: 0.2
    share_within: {same_input}
    rho: 2.5 # atoms over nonzeros; 2 in the paper

evaluation: # a model at a time, {evaluate}
  perplexity: {perplexity}
  tasks: [] # of lm-evaluation-harness, for example [piqa, arc_easy]; their data comes from the hub
{spread}\
  generate:
    prompts: ["The capital of France is", "Water is made of", "In the morning, the farmer"]
    max_new_tokens: 40
    chat: {chat}

threads: # a job's; {at_once} learning jobs fit into memory at once
  collect: {cores}
  gram: 1
  learn: {learn_threads}
  quantize: 1
  evaluate: {cores}
"""

# for a model that memory has no room for
_SPREAD = """\
  device_map: auto # over GPUs, where there are some; what has no room in memory is read from the disk, time and again
  max_memory: {{cpu: {limit}}}
"""


def config_for(
    model: str,
    *,
    text: str | None = None,
    file: str | Path = "my-model.yaml",
    cores: int | None = None,
    memory: float | None = None,
    resources: str | Path = "resources",
) -> str:
    """A config, as commented YAML, that fits a model and a machine.

    Parameters
    ----------
    model : str
        A Hugging Face folder, or ``owner/name`` on the hub, which is asked for the ``config.json`` alone.
    text : str, optional
        Text to calibrate on: a ``.jsonl`` file (one ``{"text": ...}`` a line), or plain text with blank lines between
        documents. Default: that of ``config.yaml`` where there is one, otherwise text sampled from the model.
    file : path-like
        What the file will be called; its comments say so.
    cores, memory : optional
        Of the machine (memory in bytes); default: this one's.
    resources : path-like
        Where a ``config.json`` from the hub is kept.

    Raises
    ------
    UnsupportedModelError
        If the model is none that can be taken apart.
    CospadiError
        If there is no such model, or its text is not there.
    """
    cores = cores or min(os.cpu_count() or 1, 16)
    memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    section = _model_section(model)
    complete = {"revision": "main", "rotate": None, **section}
    try:
        model_config = planning_config(complete, resources=resources)
    except ArtifactError as error:
        if section["source"] == "local":
            raise
        raise ArtifactError(model, f"there is no such folder, and {error.problem}", error.remedy) from error
    check_supported(model_config)
    shapes = Shapes(model_config)
    texts = _text_section(text)
    positions = shapes.positions or 1024
    length = min(1024, positions)
    widest = max(shapes.site_widths)
    wanted = min(max(TOKENS_AN_INPUT * widest, LEAST_TOKENS), MOST_TOKENS)
    samples = -(-wanted // length)
    device = choose_device("auto")
    dtype, reason = choose_dtype("auto", device)
    grouped = model_config.get("num_key_value_heads") or model_config["num_attention_heads"]
    values = {
        "name": section["name"],
        "run": yaml.safe_dump({"run": section["name"]}).strip(),  # which may look like a number
        "architecture": model_config["architectures"][0],
        "layers": shapes.n_layers,
        "hidden": shapes.hidden_size,
        "parameters": shapes.parameters / GIGA,
        "touched": shapes.n_layers * shapes.layer_parameters / shapes.parameters,
        "heads": f"{model_config['num_attention_heads']} heads of queries, {grouped} of keys and values",
        "embeddings": "tied to the head" if model_config.get("tie_word_embeddings") else "apart from the head",
        "cores": cores,
        "memory": memory / GIGA,
        "file": shlex.quote(str(file)),
        "model": _indented(section),
        "text_comment": " # none: give `make new` a file, TEXT=my.jsonl, for a perplexity too" if texts is None else "",
        "text": "  null" if texts is None else _indented(texts),
        "source": "self" if texts is None else "text",
        "source_comment": " # sampled from the model" if texts is None else "",
        "perplexity": "null" if texts is None else f"{{max_tokens: 20000, window: {length}}}",
        **{"samples": samples, "tokens": samples * length, "per_input": samples * length // widest, "widest": widest},
        **{"length": length, "positions": positions, "batch": max(2048, length)},
        **{"device": device, "dtype": dtype, "reason": reason},
        "same_input": yaml.safe_dump([list(part.readers) for part in PARTS], default_flow_style=True).strip(),
        "chat": json.dumps(section["source"] == "local" and has_chat_template(Path(section["path"]))),
    }
    sized = {"mode": "stream", "blocks": 1, "per_job": 1, "learn_threads": 1, "spread": ""}
    later = ("mode_comment", "collect", "learn_seconds", "learn", "evaluate", "at_once")
    draft = _TEMPLATE.format(**values, **sized, **dict.fromkeys(later, 0))
    plan = plan_run(yaml.safe_load(draft), source=str(file), model_config=model_config)
    return _TEMPLATE.format(**values, **_sizes(plan, cores, memory))


def _sizes(plan: Plan, cores: int, memory: float) -> dict[str, Any]:
    """What follows from memory, disk and time of a draft's jobs."""
    layers = plan.n_layers
    free = SHARE * min(shutil.disk_usage(".").free, memory)  # rows that memory caches are read from there
    learning = [plan.estimates.learn(plan.factorizing(name)) for name in plan.factorized]
    largest = max(learning, key=lambda work: work.memory)
    at_once = max(1, min(cores, int(memory // largest.memory)))
    threads = -(-cores // at_once)
    seconds = max(work.wall(threads, machine=read_machine()) for work in learning)
    per_job = max(1, min(int(SECONDS_A_JOB // seconds), -(-layers // cores)))

    def taken(work: Work) -> str:
        much = f"{work.memory / GIGA:.1f} GB of memory"
        return much if work.memory <= memory else f"{much}: more than this machine has"

    def collect(blocks: int, mode: str) -> Work:
        plan.config["calibration"]["mode"] = mode
        return plan.estimates.collect(blocks)

    # as many layers as memory takes, rows on disk where there is room for them
    fits = [
        (blocks, mode)
        for mode in ("store", "stream")
        for blocks in range(layers, 0, -1)
        if (work := collect(blocks, mode)).memory <= SHARE * memory and (mode == "stream" or work.disk <= free)
    ]
    blocks, mode = fits[0] if fits else (1, "stream")
    work = collect(blocks, mode)
    spread = ""
    if plan.estimates.evaluate().memory > memory:
        limit = f"{SHARE * memory / GIGA:.3g}GB"
        plan.config["evaluation"] |= {"device_map": "auto", "max_memory": {"gpu": None, "cpu": limit}}
        spread = _SPREAD.format(limit=limit)
    stored = f"rows of a chunk on disk while they are needed, {work.disk / GIGA:.1f} GB"
    return {
        "mode": mode,
        "mode_comment": stored if mode == "store" else "Grams are summed on the fly, no rows on disk",
        **{"blocks": blocks, "collect": taken(work), "per_job": per_job, "at_once": at_once},
        **{"learn_seconds": per_job * seconds, "learn": taken(largest), "learn_threads": threads},
        **{"evaluate": taken(plan.estimates.evaluate()), "spread": spread},
    }


def _model_section(model: str) -> dict[str, Any]:
    folder = Path(model)
    if folder.is_dir():
        return {"name": _name(folder.resolve().name), "source": "local", "path": str(folder)}
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model, re.ASCII):
        raise ConfigError([f"MODEL: {model!r} is neither a folder nor a name on the hub (owner/name)"], "make new")
    return {"name": _name(model.partition("/")[2]), "source": "hub", "repo": model}


def _text_section(text: str | None) -> dict[str, Any] | None:
    if text is None:
        base = Path("config.yaml")
        return yaml.safe_load(base.read_text()).get("text") if base.exists() else None
    if not Path(text).is_file():
        raise ConfigError([f"TEXT: {text!r} is no file"], "make new")
    return {"name": _name(Path(text).stem), "source": "jsonl" if text.endswith(".jsonl") else "file", "path": text}


def _name(text: str) -> str:
    """A name that a config may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:100].strip("._-") or "model"


def _indented(section: Mapping[str, Any]) -> str:
    lines = yaml.safe_dump(dict(section), sort_keys=False, allow_unicode=True, width=math.inf).splitlines()
    return "\n".join(f"  {line}" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="python -m cospadi.new", description=__doc__)
    parser.add_argument("model", help="a Hugging Face folder, or owner/name on the hub")
    parser.add_argument("--text", help="a .jsonl or plain text file to calibrate on; default: config.yaml's text")
    parser.add_argument("--output", type=Path, help="default: config/NAME.yaml")
    options = parser.parse_args(arguments)
    try:
        file = options.output or Path("config", f"{_model_section(options.model)['name']}.yaml")
        if file.exists():
            raise ConfigError([f"{file} is there already: remove it, or name another with OUTPUT="], "make new")
        content = config_for(options.model, text=options.text, file=file)
        plan_run(yaml.safe_load(content), source=str(file))  # the folder of a local model is looked at too
        with replacing(file) as temporary:
            temporary.write_text(content, encoding="utf-8")
    except CospadiError as error:
        raise SystemExit(str(error)) from None
    print(f"{file} fits this model and this machine; read it, then: make run CONFIG={shlex.quote(str(file))}")


if __name__ == "__main__":
    main()
