"""Plan: which jobs, files and resources follow from a config and the model's ``config.json``.

Everything here is known when the Snakefile is parsed: no checkpoint is read, neither torch nor transformers imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cospadi.errors import ConfigError, UnsupportedModelError
from cospadi.methods import METHODS
from cospadi.pruning import FOLDABLE, PRUNERS, removed_count
from cospadi.resources import FORWARD, GPU_FORWARD, MEBI, Estimates, Work
from cospadi.sources import planning_config
from cospadi.stage import has_gpu
from cospadi.structure import check_supported, layer_name, n_layers

DENSE = "dense"  # the model as it is, evaluated beside the variants

PACKAGE = Path(__file__).parent
# What a run takes from these is chosen by name in the config, and the chooser names the chosen module
_REGISTRIES = {"cospadi.methods", "cospadi.solvers", "cospadi.sources"}

GPU_STAGES = frozenset({"collect", "prune", "learn", "evaluate", "train"})
# What takes longer does not share a SLURM job: the six seconds of start-up are under 5 % of it
SMALL_SECONDS = 120.0
# Not more CPUs than `cores` of the profile: the executor's step would ask for more than the job has
SHARED_CPUS = 16


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
        self.estimates = Estimates(config, model_config)
        self._started = time.time()
        self.factorized = [name for name in self.variants if self.factorizing(name)]
        self.pruned = [name for name in self.variants if not self.factorizing(name)]
        self._base_of, self.pruned_bases = self._find_bases()
        faults = [*self._pruning_faults(model_config["architectures"][0]), *self._sharing_faults()]
        if faults:
            raise ConfigError(faults)
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

    def _pruning_faults(self, architecture: str) -> Iterator[str]:
        for name in self.variants:
            step = self.steps(name)[0]
            if step["method"] not in PRUNERS:
                continue
            highest = max(step["blocks"]) if isinstance(step["blocks"], list) else -1
            if removed_count(step) >= self.n_layers or highest >= self.n_layers:
                yield f"variants.{name}.blocks: {step['blocks']}; the model has {self.n_layers} blocks"
            if PRUNERS[step["method"]].fits and architecture not in FOLDABLE:
                raise UnsupportedModelError(
                    f"variants.{name}: {step['method']} folds a linear map into the MLP's last matrix, and "
                    f"{architecture} has a norm behind it. It works with {', '.join(FOLDABLE)}; "
                    "uidl, shortgpt and random_cut work with every family"
                )

    def _sharing_faults(self) -> Iterator[str]:
        """Projections that cannot have one dictionary: a dictionary has as many rows as they have inputs."""
        shapes = self.estimates.shapes.matrices
        for name in self.factorized:
            for bundle in self.factorizing(name).get("share_within", ()):
                widths = {projection: shapes[projection][0] for projection in bundle}
                if len(set(widths.values())) > 1:
                    found = ", ".join(f"{projection} has {width} inputs" for projection, width in widths.items())
                    yield f"variants.{name}.share_within: {found}; those that share have the same number"

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

    def learns_model(self, variant: str) -> bool:
        """Whether a variant's method learns all layers in one job."""
        settings = self.factorizing(variant)
        return settings is not None and METHODS[settings["method"]].whole_model is not None

    def drift_of(self, variant: str) -> list[str]:
        """How far blocks move the predicted token, for the methods that learn all layers in one job."""
        return [f"{self.results}/{self.base_of(variant)}drift.json"] if self.learns_model(variant) else []

    def grams_of(self, unit: str, base: str = "") -> list[str]:
        """Gram files of a unit's layers."""
        return [f"{self.results}/{base}gram/{layer_name(layer)}.h5" for layer in layers_of(unit)]

    def units(self, variant: str) -> list[str]:
        """Units of a variant: what one learning job each handles; none where nothing is learned."""
        settings = self.factorizing(variant)
        if settings is None:
            return []
        layers = self.n_layers_of(self.base_of(variant))
        size = layers if self.learns_model(variant) else settings.get("group_size", 1)
        groups = [range(first, min(first + size, layers)) for first in range(0, layers, size)]
        return [layer_name(group[0]) if len(group) == 1 else f"layers_{chunk_name(group)}" for group in groups]

    def warm_factors_of(self, variant: str, unit: str) -> list[str]:
        """Factors that learning a unit starts from: another variant's, as a list that is empty where it has none."""
        source = self.factorizing(variant).get("warm_start")
        return [f"{self.results}/{source}/factors/{unit}.safetensors"] if source else []

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

    def trained(self, pattern: str) -> list[str]:
        """`pattern` with ``{experiment}``, ``{trained}`` and ``{seed}`` filled in, for every model from scratch."""
        training = self.config["training"] or {}
        return [
            pattern.replace("{experiment}", name).replace("{trained}", variant).replace("{seed}", str(seed))
            for name in ("language", "vision")
            if training.get(name)
            for variant in training[name]["variants"]
            for seed in training["seeds"]
        ]

    def training_report(self) -> str:
        """Report of a run that trains models from scratch.

        Raises
        ------
        ConfigError
            If it trains none.
        """
        if self.config["training"] is None:
            raise ConfigError(["training: missing, this run trains nothing; see config/masa-train.yaml"])
        return f"{self.results}/report.zip"

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

    def training(self, experiment: str) -> dict[str, Any]:
        """Settings that decide how the models of an experiment are trained, without its variants."""
        settings = self.config["training"][experiment]
        return {key: value for key, value in settings.items() if key != "variants"}

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

        def mem_mb(wildcards: Any, attempt: int) -> int:
            return self.work(stage, wildcards).mem_mb(attempt)

        return mem_mb

    def runtime(self, stage: str) -> Callable[..., int]:
        """Time limit of a job of `stage` in minutes, a function for Snakemake: the same way."""

        def runtime(wildcards: Any, attempt: int, threads: int) -> int:
            on_gpu = bool(self.gpus()) and stage in GPU_STAGES
            return self.work(stage, wildcards).runtime(attempt, threads, on_gpu)

        return runtime

    def work(self, stage: str, wildcards: Any) -> Work:
        """What the job of `stage` with these wildcards does (`resources`)."""
        return getattr(self, f"_{stage}_work")(wildcards)

    def group(self, stage: str) -> Callable[..., str | None]:
        """SLURM job that a job of `stage` shares, a function for Snakemake (local runs know no groups).

        Grams are in the job of their chunk's collection, side by side, where they are few and take no longer. Small
        units, each learned and then packed, are all called ``unit``; they run in turn, and the profile's
        ``group-components`` says how many make a job.
        """

        def chunk(wildcards: Any) -> str | None:
            layer = int(wildcards.first if stage == "collect" else wildcards.layer)
            chunk = next(chunk for chunk in self.chunks_of(wildcards.base) if layer in chunk)
            collecting = self.estimates.collect(len(chunk)).wall(self.config["threads"]["collect"], bool(self.gpus()))
            cpus = len(chunk) * self.config["threads"]["gram"]
            if cpus > SHARED_CPUS or self.estimates.gram().wall() > max(SMALL_SECONDS, collecting):
                return None
            return f"chunk_{wildcards.base.replace('/', '_')}{chunk_name(chunk)}"

        def unit(wildcards: Any) -> str | None:
            return "unit" if self._learn_work(wildcards).wall() < SMALL_SECONDS else None

        return chunk if stage in ("collect", "gram") else unit

    def _fetch_work(self, _wildcards: Any) -> Work:
        return self.estimates.fetch()

    def _inspect_work(self, _wildcards: Any) -> Work:
        return self.estimates.inspect()

    def _prepare_work(self, _wildcards: Any) -> Work:
        return self.estimates.prepare()

    def _collect_work(self, wildcards: Any) -> Work:
        return self.estimates.collect(int(wildcards.last) - int(wildcards.first) + 1)

    def _gram_work(self, _wildcards: Any) -> Work:
        return self.estimates.gram()

    def _prune_work(self, wildcards: Any) -> Work:
        # one walk to choose; to fit, one of the model as it is and of what is left for every cut
        settings = self.pruned_bases.get(getattr(wildcards, "base", ""))
        return self.estimates.prune(2 * settings.get("cuts", 1) if settings else 1)

    def _learn_work(self, wildcards: Any) -> Work:
        return self.estimates.learn(
            self.factorizing(wildcards.variant),
            len(layers_of(wildcards.unit)),
            whole_model=self.learns_model(wildcards.variant),
        )

    def _quantize_work(self, wildcards: Any) -> Work:
        return self.estimates.quantize(self.factorizing(wildcards.variant), len(layers_of(wildcards.unit)))

    def _assemble_work(self, _wildcards: Any) -> Work:
        return self.estimates.assemble()

    def _evaluate_work(self, _wildcards: Any) -> Work:
        return self.estimates.evaluate()

    def _train_work(self, wildcards: Any) -> Work:
        flops = self._train_flops(wildcards)
        return Work(self._train_bytes(wildcards), 15, flops / FORWARD, flops / GPU_FORWARD)

    def _train_bytes(self, wildcards: Any) -> float:
        parameters, tokens, vocabulary = self._training_sizes(wildcards.experiment)
        sizes = self.config["training"][wildcards.experiment]["model"]
        # weights, gradients and AdamW's moments; what the blocks and the logits keep for the backward pass
        kept = 40 * sizes["layers"] * (sizes["hidden_size"] + sizes["intermediate_size"]) + 16 * vocabulary
        return 2000 * MEBI + 16 * parameters + tokens * kept

    def _train_flops(self, wildcards: Any) -> float:
        parameters, tokens, _ = self._training_sizes(wildcards.experiment)
        return 8 * parameters * tokens * self.config["training"][wildcards.experiment]["steps"]

    def _training_sizes(self, experiment: str) -> tuple[int, int, int]:
        """Parameters of a dense model, tokens a step, and entries of the logits of a token."""
        settings = self.config["training"][experiment]
        sizes = settings["model"]
        hidden, vocabulary = sizes["hidden_size"], settings.get("vocabulary", 10)
        block = 4 * hidden**2 + 3 * hidden * sizes["intermediate_size"]
        length = settings["length"] if experiment == "language" else (8 // settings["patch"]) ** 2 + 1
        return sizes["layers"] * block + vocabulary * hidden, settings["batch_size"] * length, vocabulary


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
