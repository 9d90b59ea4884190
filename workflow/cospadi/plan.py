"""Plan: which jobs, files and resources follow from a config and the model's ``config.json``.

Everything here is known when the Snakefile is parsed: no checkpoint is read, neither torch nor transformers imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cospadi.errors import ConfigError, UnsupportedModelError
from cospadi.methods import METHODS
from cospadi.pruning import FOLDABLE, PRUNERS, removed_count
from cospadi.sources import planning_config
from cospadi.stage import has_gpu
from cospadi.structure import check_supported, layer_name, n_layers

DENSE = "dense"  # the model as it is, evaluated beside the variants

PACKAGE = Path(__file__).parent
# What a run takes from these is chosen by name in the config, and the chooser names the chosen module
_REGISTRIES = {"cospadi.methods", "cospadi.solvers", "cospadi.sources"}

# a sober guess of what one CPU thread gets done, so that a time limit is not the reason a job fails
_FLOPS_PER_THREAD = 1.0e10
_MEBI = 2**20


class Plan:
    """The jobs of one run.

    A *base* is a model that something is learned from. It is named by what stands between the results and its
    artifacts: nothing for the model as it is, ``a/`` for the pruned model of variant a, ``b/pruned/`` for what the
    first step of variant b leaves, where no variant is just that.

    Parameters
    ----------
    config : mapping
        Complete, from `config.check_config`.
    model_config : mapping, optional
        Content of the model's ``config.json``; by default what `sources.planning_config` finds.

    Attributes
    ----------
    results : str
        ``results/<run>``.
    model_folder : str
        The dense model.
    variants : list of str
        Names of the compressed models, in the order of the config.
    models : list of str
        ``dense`` and the variants: everything that is evaluated.
    factorized, pruned : list of str
        Variants with matrices to learn; variants that only lose blocks.
    pruned_bases : dict
        Base to the settings of the pruning step that makes it.

    Raises
    ------
    UnsupportedModelError
        If the architecture is none that can be taken apart, or replaceme cannot fold into it.
    ConfigError
        If more blocks shall go than there are.
    """

    def __init__(self, config: Mapping[str, Any], model_config: Mapping[str, Any] | None = None) -> None:
        self.config = config
        model = config["model"]
        model_config = planning_config(model) if model_config is None else model_config
        check_supported(model_config)
        self.n_layers = n_layers(model_config)
        self.results = f"results/{config['run']}"
        self.model_folder = model["path"] if model["source"] == "local" else f"resources/models/{model['name']}"
        self.variants = list(config["variants"])
        self.models = [DENSE, *self.variants]
        self.shapes = _Shapes(model_config)
        self._started = time.time()
        self.factorized = [name for name in self.variants if self.factorizing(name)]
        self.pruned = [name for name in self.variants if not self.factorizing(name)]
        self._base_of, self.pruned_bases = self._find_bases()
        self._check_pruning(model_config["architectures"][0])
        self.chunks = self.chunks_of("")

    # --- steps of a variant --------------------------------------------------------------------------------------

    def steps(self, variant: str) -> list[dict[str, Any]]:
        """Settings of each step of a variant; most have one."""
        settings = self.config["variants"][variant]
        return settings.get("steps", [settings])

    def factorizing(self, variant: str) -> dict[str, Any] | None:
        """Settings of the step that factorizes, if there is one."""
        return next((step for step in self.steps(variant) if step["method"] in METHODS), None)

    def base_of(self, variant: str) -> str:
        """Base that a variant is learned from, or for one that only loses blocks, the one that it is."""
        return self._base_of[variant]

    def fits(self, base: str) -> bool:
        """Whether transforms are fitted for a pruned base."""
        return PRUNERS[self.pruned_bases[base]["method"]].fits

    def _find_bases(self) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Base of every variant, and the step that makes each; equal steps are made once."""
        made: dict[str, str] = {}
        bases: dict[str, str] = {}
        for name in [*self.pruned, *self.factorized]:
            step = self.steps(name)[0]
            if step["method"] not in PRUNERS:
                bases[name] = ""
                continue
            key = json.dumps(step, sort_keys=True)
            bases[name] = f"{name}/" if name in self.pruned else made.get(key, f"{name}/pruned/")
            made.setdefault(key, bases[name])
        return bases, {base: self.steps(name)[0] for name, base in bases.items() if base}

    def _check_pruning(self, architecture: str) -> None:
        faults = []
        for name in self.variants:
            step = self.steps(name)[0]
            if step["method"] not in PRUNERS:
                continue
            highest = max(step["blocks"]) if isinstance(step["blocks"], list) else -1
            if removed_count(step) >= self.n_layers or highest >= self.n_layers:
                faults.append(f"variants.{name}: blocks: {step['blocks']}; the model has {self.n_layers} blocks")
            if PRUNERS[step["method"]].fits and architecture not in FOLDABLE:
                raise UnsupportedModelError(
                    f"variants.{name}: {step['method']} folds a linear map into the MLP's last matrix, and "
                    f"{architecture} has a norm behind it. It works with {', '.join(FOLDABLE)}; "
                    "uidl, shortgpt and random_cut work with every family"
                )
        if faults:
            raise ConfigError(faults)

    # --- files ---------------------------------------------------------------------------------------------------

    def model_of(self, name: str) -> str:
        """Folder of the model called `name`: a variant, or ``dense``."""
        return self.model_folder if name == DENSE else f"{self.results}/{name}/model"

    def text_file(self, part: str) -> list[str]:
        """``calibration.jsonl`` or ``heldout.jsonl``, as a list that is empty when nothing reads it."""
        needed = {
            "calibration": self.config["calibration"]["source"] == "text",
            "heldout": self.config["evaluation"]["perplexity"] is not None
            or "last_word" in self.config["evaluation"]["tasks"],
        }
        return [f"resources/text/{self.config['text']['name']}/{part}.jsonl"] if needed[part] else []

    def base_model(self, base: str) -> str:
        """Folder of a base's model."""
        return f"{self.results}/{base}model" if base else self.model_folder

    def n_layers_of(self, base: str) -> int:
        """Number of a base's decoder blocks."""
        return self.n_layers - (removed_count(self.pruned_bases[base]) if base else 0)

    def chunks_of(self, base: str) -> list[range]:
        """Layers of each collection job of a base."""
        layers = self.n_layers_of(base)
        size = self.config["calibration"]["blocks_per_job"] or layers
        return [range(first, min(first + size, layers)) for first in range(0, layers, size)]

    def structure_of(self, base: str) -> str:
        """Structure of a base's model."""
        return f"{self.results}/{base}structure.json"

    def hidden_before(self, first: int, base: str = "") -> list[str]:
        """Hidden states that the chunk starting at layer `first` continues from; none for the first chunk."""
        before = [chunk for chunk in self.chunks_of(base) if chunk.stop == first]
        return [f"{self.results}/{base}activations/hidden_{chunk_name(chunk)}.h5" for chunk in before]

    def activations_of(self, layer: int, base: str = "") -> str:
        """Activations of the chunk that layer `layer` is in."""
        chunk = next(chunk for chunk in self.chunks_of(base) if layer in chunk)
        return f"{self.results}/{base}activations/layers_{chunk_name(chunk)}.h5"

    def grams_of(self, unit: str, base: str = "") -> list[str]:
        """Gram files of a unit's layers."""
        return [f"{self.results}/{base}gram/{layer_name(layer)}.h5" for layer in layers_of(unit)]

    def units(self, variant: str) -> list[str]:
        """Units of a variant: what one learning job each handles; none where nothing is learned."""
        settings = self.factorizing(variant)
        if settings is None:
            return []
        size, layers = settings.get("group_size", 1), self.n_layers_of(self.base_of(variant))
        groups = [range(first, min(first + size, layers)) for first in range(0, layers, size)]
        return [layer_name(group[0]) if len(group) == 1 else f"layers_{chunk_name(group)}" for group in groups]

    def pruning_files(self, pattern: str) -> dict[str, str]:
        """`pattern` with the base filled in, for every variant that loses blocks."""
        return {name: pattern.replace("{base}", self.base_of(name)) for name in self.variants if self.base_of(name)}

    def of_all_units(self, pattern: str) -> list[str]:
        """`pattern` with ``{variant}`` and ``{unit}`` filled in, for every unit of every variant."""
        return [
            pattern.replace("{variant}", variant).replace("{unit}", unit)
            for variant in self.variants
            for unit in self.units(variant)
        ]

    def has_written(self, name: str) -> bool:
        """Whether file `name` of the results is newer than this plan; making one layer leaves no new table to show."""
        path = Path(self.results, name)
        return path.exists() and path.stat().st_mtime >= self._started

    # --- what a stage depends on ---------------------------------------------------------------------------------

    def collection(self) -> dict[str, Any]:
        """Settings that decide what is collected."""
        keys = ("mode", "dtype", "batch_tokens", "heldout_fraction")
        return {key: self.config["calibration"][key] for key in keys}

    def pruning(self) -> dict[str, Any]:
        """Settings that decide how the model is walked to remove blocks."""
        return {key: self.config["calibration"][key] for key in ("dtype", "batch_tokens", "blocks_per_job")}

    def windows(self) -> dict[str, Any]:
        """Settings that decide which windows are read."""
        keys = ("source", "samples", "length", "seed", "packing")
        return {key: self.config["calibration"][key] for key in keys}

    def learning(self, variant: str) -> dict[str, Any]:
        """Settings that decide the factors: rounding comes after them, the bits of a value before (the budget)."""
        settings = self.factorizing(variant)
        return {**settings, "codes": {key: value for key, value in settings["codes"].items() if key != "rounding"}}

    def learning_code(self, variant: str) -> str:
        """Digest of the code that learns a variant: its method and solver, and not those of other variants."""
        settings = self.factorizing(variant)
        return code_digest("cospadi.learning", *METHODS[settings["method"]].modules(settings))

    def reported(self) -> dict[str, Any]:
        """Settings that the report shows."""
        return {"variants": self.config["variants"], "evaluation": {"tasks": self.config["evaluation"]["tasks"]}}

    def gpus(self) -> int:
        """GPUs a job asks for that can use one."""
        device = self.config["device"]
        return int(device == "cuda" or (device == "auto" and has_gpu()))

    # --- resources -----------------------------------------------------------------------------------------------

    def mem_mb(self, stage: str) -> Callable[..., int]:
        """Memory of a job of `stage` in MiB, a function for Snakemake: from matrix shapes, times the attempt."""
        estimate = getattr(self, f"_{stage}_bytes")

        def mem_mb(wildcards: Any, attempt: int) -> int:
            return attempt * math.ceil(estimate(wildcards) / _MEBI)

        return mem_mb

    def runtime(self, stage: str) -> Callable[..., int]:
        """Time limit of a job of `stage` in minutes, a function for Snakemake: ten, or more by the work to do."""
        estimate = getattr(self, f"_{stage}_flops")

        def runtime(wildcards: Any, attempt: int, threads: int) -> int:
            return attempt * (10 + math.ceil(estimate(wildcards) / (_FLOPS_PER_THREAD * threads) / 60))

        return runtime

    @property
    def _tokens(self) -> int:
        return self.config["calibration"]["samples"] * self.config["calibration"]["length"]

    def _fetch_bytes(self, _wildcards: Any) -> float:
        # a GGUF is dequantized to float32 before it is written as bfloat16
        return 2000 * _MEBI + (8 * self.shapes.parameters if self.config["model"]["source"] == "wheel_gguf" else 0)

    def _fetch_flops(self, _wildcards: Any) -> float:
        return 2000 * self.shapes.parameters  # about a minute for 300 million parameters

    def _prepare_bytes(self, _wildcards: Any) -> float:
        sampling = self.config["calibration"]["source"] == "self"
        return 2000 * _MEBI + (3 * self.shapes.parameters if sampling else 0)

    def _prepare_flops(self, _wildcards: Any) -> float:
        sampling = self.config["calibration"]["source"] == "self"
        return 20 * self.shapes.parameters * self._tokens if sampling else 0

    def _collect_bytes(self, wildcards: Any) -> float:
        layers = int(wildcards.last) - int(wildcards.first) + 1
        calibration = self.config["calibration"]
        width = 2 if calibration["dtype"] == "bfloat16" else 4
        weights = width * (layers * self.shapes.layer_parameters + self.shapes.embedding_parameters)
        hidden = 2 * 2 * self._tokens * self.shapes.hidden_size
        forward = 8 * 4 * calibration["batch_tokens"] * max(self.shapes.site_widths)
        grams = 8 * layers * self.shapes.gram_entries if calibration["mode"] == "stream" else 0
        return 2000 * _MEBI + weights + hidden + forward + 1.2 * grams

    def _collect_flops(self, wildcards: Any) -> float:
        layers = int(wildcards.last) - int(wildcards.first) + 1
        grams = self.shapes.gram_entries if self.config["calibration"]["mode"] == "stream" else 0
        return 2 * layers * self._tokens * (self.shapes.layer_parameters + grams)

    def _prune_bytes(self, _wildcards: Any) -> float:
        calibration = self.config["calibration"]
        width = 2 if calibration["dtype"] == "bfloat16" else 4
        blocks = calibration["blocks_per_job"] or self.n_layers
        weights = width * (blocks * self.shapes.layer_parameters + self.shapes.embedding_parameters)
        hidden = 2 * 2 * self._tokens * self.shapes.hidden_size
        states = 8 * 256 * self.n_layers * self.shapes.hidden_size
        return 3000 * _MEBI + weights + hidden + states + 8 * 8 * self.shapes.hidden_size**2

    def _prune_flops(self, wildcards: Any) -> float:
        # one walk to choose; to fit, one of the model as it is and of what is left for every cut
        base = getattr(wildcards, "base", "")
        walks = 2 * self.pruned_bases[base].get("cuts", 1) if base else 1
        return 4 * walks * self._tokens * self.n_layers * self.shapes.layer_parameters

    def _gram_bytes(self, _wildcards: Any) -> float:
        return 500 * _MEBI + 4 * 8 * max(self.shapes.site_widths) ** 2

    def _gram_flops(self, _wildcards: Any) -> float:
        return 4 * self._tokens * self.shapes.gram_entries

    def _learn_bytes(self, wildcards: Any) -> float:
        layers = len(layers_of(wildcards.unit))
        return 500 * _MEBI + layers * (6 * 4 * self.shapes.layer_parameters + 3 * 8 * max(self.shapes.site_widths) ** 2)

    def _learn_flops(self, wildcards: Any) -> float:
        return 500 * len(layers_of(wildcards.unit)) * self.shapes.product_flops

    def _quantize_bytes(self, wildcards: Any) -> float:
        layers = len(layers_of(wildcards.unit))
        return 500 * _MEBI + layers * (4 * 4 * self.shapes.layer_parameters + 8 * max(self.shapes.site_widths) ** 2)

    def _quantize_flops(self, wildcards: Any) -> float:
        return 10 * len(layers_of(wildcards.unit)) * self.shapes.product_flops

    def _assemble_bytes(self, _wildcards: Any) -> float:
        return 2000 * _MEBI + 4 * self.shapes.parameters

    def _assemble_flops(self, _wildcards: Any) -> float:
        return 1000 * self.shapes.parameters

    def _evaluate_bytes(self, _wildcards: Any) -> float:
        evaluation = self.config["evaluation"]
        window = (evaluation["perplexity"] or {"window": 2048})["window"]
        logits = 3 * 4 * evaluation["batch_size"] * window * self.shapes.vocabulary
        return 2500 * _MEBI + 3 * self.shapes.parameters + logits

    def _evaluate_flops(self, _wildcards: Any) -> float:
        evaluation = self.config["evaluation"]
        tokens = (evaluation["perplexity"] or {"max_tokens": 0})["max_tokens"] or 1_000_000
        task_tokens = 200 * (evaluation["limit"] or 20_000) * len(evaluation["tasks"])
        return 4 * self.shapes.parameters * (tokens + task_tokens)


class _Shapes:
    """Sizes by ``config.json``, for estimates alone; the true list of matrices is `structure.inspect_model`'s."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.hidden_size = hidden = config["hidden_size"]
        self.vocabulary = config["vocab_size"]
        inner, heads = config["intermediate_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
        matrices = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        matrices += [(hidden, inner), (hidden, inner), (inner, hidden)]
        self.site_widths = (hidden, queries, hidden, inner)
        self.gram_entries = sum(width**2 for width in self.site_widths)
        self.layer_parameters = sum(d_in * d_out for d_in, d_out in matrices)
        # one product of a dictionary as wide as its matrix with codes of every column
        self.product_flops = sum(2 * d_in * d_in * d_out for d_in, d_out in matrices)
        self.embedding_parameters = self.vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
        self.parameters = config["num_hidden_layers"] * self.layer_parameters + self.embedding_parameters


def chunk_name(layers: Sequence[int]) -> str:
    """``00-09`` for consecutive layers 0 to 9."""
    return f"{layers[0]:02d}-{layers[-1]:02d}"


def layers_of(unit: str) -> list[int]:
    """Layers of a unit: ``layer_03`` is ``[3]``, ``layers_02-03`` is ``[2, 3]``."""
    first, _, last = unit.partition("_")[2].partition("-")
    return list(range(int(first), int(last or first) + 1))


def one_of(names: Sequence[str]) -> str:
    """A regular expression for exactly these names; for none of them, one that nothing matches."""
    # never an empty expression: Snakemake takes that for "anything"
    return f"(?:{'|'.join(map(re.escape, names))})" if names else "(?!)"


@cache
def code_digest(*modules: str) -> str:
    """SHA-256 over the source of modules and of all modules of this package that they import.

    Snakemake sees changes of a rule's script, not of what the script imports, so every rule carries this digest of
    its stage as a parameter. The import closure is found in the source (imports inside functions count); of a
    registry only what the caller names is part of it.
    """
    found: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found and module not in _REGISTRIES:
            found[module], imports = _read(module)
            waiting += imports
    digest = hashlib.sha256()
    for module in sorted(found):
        digest.update(f"{module}\0{len(found[module])}\0".encode() + found[module])
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
    """Source of a module, and the modules of this package that it imports anywhere in it."""
    source = _source_file(module).read_bytes()
    package = module if _source_file(module).name == "__init__.py" else module.rpartition(".")[0]
    names = []
    for node in ast.walk(ast.parse(source)):
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
    return source, [name for name in names if name.startswith(f"{PACKAGE.name}.")]
