"""Resources: what a job of each stage needs, from matrix shapes and measured rates (`work`).

`cospadi.needs` prints the result as a table, beside what a finished run measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from cospadi.arrays import PRODUCT_ROWS, held_out_of
from cospadi.budget import nbytes_left
from cospadi.embeddings import ROUNDINGS
from cospadi.errors import UnsupportedModelError
from cospadi.formats.values import storage_of
from cospadi.methods import METHODS
from cospadi.methods.base import MEASURED, Method, planned_problems
from cospadi.methods.menus import allocator_of
from cospadi.problem import GRADIENTS, SEQUENTIAL
from cospadi.runtime.cospadi_registry import FACTOR_CODECS
from cospadi.sizes import nbytes_of
from cospadi.sources import MODEL_SOURCES
from cospadi.structure import SITES
from cospadi.work import (
    COMPILED,
    FORWARD,
    GPU_FORWARD,
    GPU_PRODUCT,
    GRAM,
    LOOP,
    MEBI,
    NUMPY,
    PRODUCT,
    TOKENIZER,
    TORCH,
    Cost,
    Work,
    in_all,
)

# documents of a task of lm-eval, the mean of the paper's; tokens of a question and of each of its answers
_TASK_DOCUMENTS = 3500
_QUESTION_TOKENS, _ANSWER_TOKENS, _ANSWERS = 60, 25, 4


class Shapes:
    """Sizes by ``config.json``, for plans; the true list of matrices is `structure.inspect_model`'s.

    Raises
    ------
    UnsupportedModelError
        If a size is missing or is no positive integer.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.hidden_size = hidden = _size(config, "hidden_size")
        self.vocabulary = _size(config, "vocab_size")
        self.n_layers = _size(config, "num_hidden_layers")
        # None: not said
        self.positions = _size(config, "max_position_embeddings", None)
        inner, heads = _size(config, "intermediate_size"), _size(config, "num_attention_heads")
        head_dim = _size(config, "head_dim", None) or hidden // heads
        queries, keys = heads * head_dim, _size(config, "num_key_value_heads", heads) * head_dim
        self.matrices = {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        self.site_widths = [self.matrices[site[0]][0] for site in SITES]
        self.gram_entries = sum(width**2 for width in self.site_widths)
        self.layer_parameters = sum(d_in * d_out for d_in, d_out in self.matrices.values())
        # norms and biases of a layer, at most
        self.small_parameters = 4 * hidden + 2 * head_dim
        if config.get("attention_bias") or config.get("mlp_bias") or config["architectures"][0].startswith("Qwen2"):
            self.small_parameters += sum(d_out for _, d_out in self.matrices.values())
        self.embedding_parameters = self.vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
        self.parameters = self.n_layers * self.layer_parameters + self.embedding_parameters


def _size(config: Mapping[str, Any], key: str, *default: int | None) -> int:
    """An entry of ``config.json``, or the default where it is missing or null."""
    value = config.get(key)
    if value is None and default:
        return default[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModelError(f"config.json: {key} is {value!r}; a positive integer is needed")
    return value


class Estimates:
    """Work of every stage of a run.

    Parameters
    ----------
    config : mapping
        Complete, from `config.check_config`.
    model_config : mapping
        Content of the model's ``config.json``.
    """

    def __init__(self, config: Mapping[str, Any], model_config: Mapping[str, Any]) -> None:
        self.shapes = Shapes(model_config)
        self._calibration = calibration = config["calibration"]
        self._evaluation = config["evaluation"]
        self._source = config["model"]["source"]
        self._tokens = calibration["samples"] * calibration["length"]
        self._width = _value_bytes(calibration["dtype"])

    def fetch(self) -> Work:
        """Bringing the model, as its source says."""
        return MODEL_SOURCES[self._source].work(self.shapes)

    def inspect(self) -> Work:
        """Headers alone."""
        return Work(TORCH, 6)

    def prepare(self, samples: int | None = None) -> Work:
        """Tokenizing a text takes seconds; sampling from the model is a forward pass a token. `samples`: so many
        windows in place of the calibration's.
        """
        tokens = self._tokens if samples is None else samples * self._calibration["length"]
        disk = 5 * tokens
        if self._calibration["source"] != "self":
            return Work(TOKENIZER + 100 * disk, 3, disk=disk)
        # one token of each window at a time: assumed, a quarter of the speed of a long forward pass
        core = Cost({FORWARD: 8 * self.shapes.parameters * tokens})
        return Work(TORCH + 2.2 * self._width * self.shapes.parameters, 15, core, disk=disk)

    def collect(self, n_layers: int) -> Work:
        """A forward pass of a chunk over all windows; in mode ``stream`` its Grams too."""
        shapes, batch = self.shapes, max(self._calibration["batch_tokens"], self._calibration["length"])
        weights = self._width * (n_layers * shapes.layer_parameters + shapes.embedding_parameters)
        # the pages of the mapped file count beside the tensors read from it; HDF5 keeps a MiB a dataset
        weights = 2 * weights + 4 * MEBI * n_layers
        forward = 6 * 4 * batch * max(shapes.site_widths)
        hidden = self._width * self._tokens * shapes.hidden_size
        flops = 2 * n_layers * self._tokens * shapes.layer_parameters
        memory = TORCH + weights + hidden + forward
        if self._calibration["mode"] == "store":
            rows = self._width * self._tokens * sum(shapes.site_widths) * n_layers
            disk = hidden + rows
            return Work(memory, 6, Cost({FORWARD: flops}), Cost({GPU_FORWARD: flops}), disk, moved=disk, passing=rows)
        grams = 8 * n_layers * shapes.gram_entries
        products = 2 * n_layers * self._tokens * shapes.gram_entries
        return Work(
            memory + grams + _product(max(shapes.site_widths)),
            6,
            Cost({FORWARD: flops, GRAM: products}),
            Cost({GPU_FORWARD: flops, GPU_PRODUCT: products}),
            disk=grams + hidden,
            moved=grams + hidden,
            passing=grams,
        )

    def gradients(self, n_layers: int) -> Work:
        """A chunk forward, its gradient back, a Gram for every matrix, and once the head."""
        shapes, batch = self.shapes, max(self._calibration["batch_tokens"], self._calibration["length"])
        head = shapes.vocabulary * shapes.hidden_size
        weights = 2 * self._width * (n_layers * shapes.layer_parameters + shapes.embedding_parameters + head)
        # what a block keeps for its gradient: inputs and outputs of matrices, norms and the activation, in float32
        kept = 4 * batch * sum(d_in + 2 * d_out for d_in, d_out in shapes.matrices.values())
        logits = 4 * 8 * 256 * shapes.vocabulary
        entries = sum(d_in**2 for d_in, _ in shapes.matrices.values())
        grams = 8 * n_layers * entries
        hidden = self._width * self._tokens * shapes.hidden_size
        widest = max(shapes.site_widths)
        memory = TORCH + weights + n_layers * kept + logits + grams + 2 * _product(widest)
        # forward, gradients at the inputs, and of the head
        flops = 4 * self._tokens * (n_layers * shapes.layer_parameters + head)
        products = 2 * n_layers * self._tokens * entries
        return Work(
            memory,
            6,
            Cost({FORWARD: flops, GRAM: products}),
            Cost({GPU_FORWARD: flops, GPU_PRODUCT: products}),
            disk=grams + hidden,
            moved=grams + 2 * hidden,
        )

    def head(self) -> Work:
        """The head's forward pass over all windows, and what it predicts, some tokens at a time."""
        shapes = self.shapes
        head = shapes.vocabulary * shapes.hidden_size
        weights = 2 * self._width * (shapes.layer_parameters + shapes.embedding_parameters + head)
        logits = 4 * 6 * 256 * shapes.vocabulary
        hidden = self._width * self._tokens * shapes.hidden_size
        flops = 2 * self._tokens * head
        core = Cost({FORWARD: flops, LOOP: self._tokens * shapes.vocabulary / 5e7})
        return Work(
            TORCH + weights + logits + 8 * shapes.hidden_size**2, 6, core, Cost({GPU_FORWARD: flops}), moved=hidden
        )

    def gram(self) -> Work:
        """Grams of one layer from its rows, or taken over from the streamed ones."""
        widest, grams = max(self.shapes.site_widths), 8 * self.shapes.gram_entries
        # one at a time in float64, and blocks as they are and in float32
        memory = NUMPY + 8 * widest**2 + (32 + 16) * MEBI
        if self._calibration["mode"] == "stream":
            return Work(memory, 1, disk=grams, moved=2 * grams)
        rows = self._width * self._tokens * sum(self.shapes.site_widths)
        core = Cost({GRAM: 2 * self._tokens * self.shapes.gram_entries})
        memory += _product(widest)
        return Work(memory, 1, core, disk=grams, moved=grams + rows)

    def prune(self, walks: int = 1, n_kept: int = 8) -> Work:
        """Walks over all blocks; `n_kept` hidden-size-squared float64 moments are in memory."""
        shapes = self.shapes
        blocks = self._calibration["blocks_per_job"] or shapes.n_layers
        weights = self._width * (blocks * shapes.layer_parameters + shapes.embedding_parameters)
        hidden = 2 * self._width * self._tokens * shapes.hidden_size
        states = 8 * 256 * shapes.n_layers * shapes.hidden_size
        memory = TORCH + 2 * weights + hidden + states + n_kept * 8 * shapes.hidden_size**2
        flops = 4 * walks * self._tokens * shapes.n_layers * shapes.layer_parameters
        return Work(memory, 6, Cost({FORWARD: flops}), Cost({GPU_FORWARD: flops}))

    def learn(self, settings: Mapping[str, Any], n_layers: int = 1) -> Work:
        """Learning a unit of `n_layers` layers, problem after problem, each as its method says."""
        method, storage = METHODS[settings["method"]], storage_of(settings.get("codes", {}))
        options = method.complete(settings)
        problems = planned_problems(settings, method, self.shapes.matrices, n_layers)
        works, factors, grams = [], 0.0, 0.0
        for targets in problems:
            shapes = [target.shape for target in targets]
            nbytes = nbytes_left(shapes, settings["ratio"])
            works.append(method.work(targets, nbytes, options, storage))
            factors += nbytes * _before_rounding(method, storage)
            if method.scope == "problem":  # Grams of the other layers that share, until the last has been measured
                grams = max(grams, 8 * (len({target.layer for target in targets}) - 1) * shapes[0][0] ** 2)
        core, gpu = in_all(works)
        memory = NUMPY + factors + grams + max(work.memory for work in works)
        return Work(memory, 1, core, gpu, factors, moved=factors)

    def learn_in_turn(self, settings: Mapping[str, Any], n_layers: int = 1) -> Work:
        """Learning a unit, and two streams of hidden states through its blocks, which may be trained besides; or the
        layers behind it, which are.
        """
        learned, shapes = self.learn(settings, n_layers), self.shapes
        if settings.get("compensate") is not None:
            return self._with_layers_behind(learned, settings, n_layers)
        batch = max(self._calibration["batch_tokens"], self._calibration["length"])
        # two blocks, as it is and compressed, each beside the pages of the mapped file
        weights = 4 * self._width * (shapes.layer_parameters + shapes.embedding_parameters)
        hidden = 2 * self._width * self._tokens * shapes.hidden_size
        passes, memory = 6, TORCH + weights + 2 * hidden + 16 * 4 * batch * max(shapes.site_widths)
        products = 0.0
        if settings["target"] == SEQUENTIAL:
            # up to every site, once in each model; a metric of gradients is of a matrix and not of a site
            passes += 4
            entries = shapes.gram_entries
            if settings["metric"] == GRADIENTS:
                entries = sum(d_in**2 for d_in, _ in shapes.matrices.values())
            memory += 8 * 4 * entries
            products = 6 * self._tokens * entries
        if settings["refine"] is not None:
            tokens = max(settings["refine"]["batch_tokens"], self._calibration["length"])
            # values, where they are, their gradients and two moments; what a block keeps for its gradient
            memory += 6 * 4 * shapes.layer_parameters
            memory += 4 * tokens * 2 * sum(d_in + 2 * d_out for d_in, d_out in shapes.matrices.values())
            samples = settings["refine"]["samples"]
            share = 1.0 if samples is None else min(1.0, samples / self._calibration["samples"])
            passes += 7 * settings["refine"]["epochs"] * share
        flops = n_layers * passes * self._tokens * shapes.layer_parameters
        products *= n_layers
        return Work(
            max(memory, learned.memory) + learned.memory,
            6 + learned.start,
            learned.core + {FORWARD: flops, GRAM: products},
            learned.gpu + {GPU_FORWARD: flops, GPU_PRODUCT: products},
            disk=learned.disk + hidden,
            moved=learned.moved + 2 * hidden,
        )

    def _with_layers_behind(self, learned: Work, settings: Mapping[str, Any], n_layers: int) -> Work:
        """Learning a unit, and training all layers behind it, on average half of the model."""
        options, shapes = settings["compensate"], self.shapes
        samples = options["samples"] or self._calibration["samples"]
        trainings = n_layers / options["every"]
        # the teacher once for all units; some are looked at before and after every epoch; half is gone back through
        looks = (1 + math.ceil(options["epochs"])) * _looked_at(samples)
        passes = n_layers / shapes.n_layers + trainings * (looks + 2 * options["epochs"])
        behind = max(0, shapes.n_layers - options["every"])  # the first training has the most
        memory, trained, flops = self._end_to_end(
            settings, options, samples, passes, trainings * options["epochs"], n_layers=behind
        )
        # weights as trained, float32, and those of learned layers, and what the teacher gave
        handed = 4 * trained + self._width * samples * self._calibration["length"] * shapes.hidden_size
        return Work(
            memory + learned.memory,
            6 + learned.start,
            learned.core + {FORWARD: flops},
            learned.gpu + {GPU_FORWARD: flops},
            disk=learned.disk + handed,
            moved=learned.moved + 2 * handed + 2 * trainings * shapes.parameters,
        )

    def distill(self, settings: Mapping[str, Any]) -> Work:
        """The dense model once over the windows, then forward and back through the model whose factors are trained."""
        shapes, options = self.shapes, settings["distill"]
        samples = options["samples"] or self._calibration["samples"]
        # forward once in each; a pass forward and back is three; some are looked at before and after every epoch
        passes = 1 + 3 * options["epochs"] + (1 + options["epochs"]) * _looked_at(samples)
        memory, _, flops = self._end_to_end(
            settings, options, samples, passes, 1 + options["epochs"], n_layers=shapes.n_layers
        )
        written = nbytes_left(list(shapes.matrices.values()) * shapes.n_layers, settings["ratio"])
        written *= _before_rounding(METHODS[settings["method"]], storage_of(settings["codes"]))
        core, gpu = Cost({FORWARD: flops}), Cost({GPU_FORWARD: flops})
        return Work(memory, 6, core, gpu, disk=written, moved=2 * written + 2 * 2 * shapes.parameters)

    def _end_to_end(
        self,
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
        samples: int,
        passes: float,
        teachings: float,
        *,
        n_layers: int,
    ) -> tuple[float, float, float]:
        """Training the last `n_layers` of a model on `samples` windows: memory, numbers that may be trained, and
        products, for so many `passes` forward through the model and through the teacher's head.
        """
        shapes, calibration = self.shapes, self._calibration
        tokens = max(options["batch_tokens"], calibration["length"])
        chosen = settings.get("targets") or shapes.matrices
        trained = n_layers * sum(d_in * d_out for name, (d_in, d_out) in shapes.matrices.items() if name in chosen)
        # a number, where it may be, its gradient, two moments, and what it was in the best epoch; once to compute with
        factors = (5 * 4 + 1 + self._width) * trained
        # all that is not trained, and the head once more
        weights = self._width * (shapes.parameters - trained + shapes.vocabulary * shapes.hidden_size)
        # what blocks keep for their gradients: inputs and outputs of matrices, norms and the activation
        kept = n_layers * tokens * sum(d_in + 2 * d_out for d_in, d_out in shapes.matrices.values())
        hidden = self._width * samples * calibration["length"] * shapes.hidden_size
        logits = 4 * 5 * 256 * shapes.vocabulary
        memory = TORCH + factors + weights + self._width * kept + hidden + logits
        head = teachings * shapes.vocabulary * shapes.hidden_size
        return memory, trained, 2 * samples * calibration["length"] * (passes * shapes.parameters + head)

    def profile(self, settings: Mapping[str, Any], n_layers: int = 1) -> Work:
        """What the allocation of a unit of `n_layers` layers has to know, problem after problem."""
        method, storage = METHODS[settings["method"]], storage_of(settings.get("codes", {}))
        options = method.complete(settings)
        works = [
            allocator_of(method, settings).work(
                targets, nbytes_left([target.shape for target in targets], settings["ratio"]), options, storage
            )
            for targets in planned_problems(settings, method, self.shapes.matrices, n_layers)
        ]
        core, gpu = in_all(works)
        memory = max(work.memory for work in works)
        if settings["allocation"] != MEASURED:
            return Work(NUMPY + memory, 1, core, gpu)
        # the model in float32 beside the pages of its file, and the head twice, once for each size of every problem
        shapes, length = self.shapes, self._calibration["length"]
        tokens = min(settings["measured_windows"], self._calibration["samples"]) * length
        head = shapes.vocabulary * shapes.hidden_size
        flops = 2 * tokens * (shapes.n_layers * shapes.layer_parameters + 2 * head) * len(settings["menu"]) * len(works)
        weights = 4 * 2 * (shapes.parameters + head) + 8 * tokens * shapes.hidden_size
        forward = 16 * 4 * max(self._calibration["batch_tokens"], length) * max(shapes.site_widths)
        logits = 4 * 6 * 256 * shapes.vocabulary
        memory += TORCH + weights + forward + logits
        return Work(memory, 6, core + {FORWARD: flops}, gpu + {GPU_FORWARD: flops})

    def quantize(self, settings: Mapping[str, Any], n_layers: int = 1) -> Work:
        """Packing a unit, matrix after matrix, with the error of what is stored (float64)."""
        chosen = settings.get("targets") or self.shapes.matrices
        matrices = [shape for name, shape in self.shapes.matrices.items() if name in chosen]
        packed = n_layers * nbytes_left(matrices, settings["ratio"])
        optimal = settings.get("codes", {}).get("rounding") == "optimal"
        at_once, flops = 0.0, 0.0
        for d_in, d_out in matrices:
            k = min(d_in, d_out)  # atoms, about: bytes are for fewer, but for many bits in the codes
            squares, codes = (2, 4) if optimal else (1, 1)
            at_once = max(at_once, squares * 8 * d_in**2 + 4 * 8 * d_in * d_out + codes * 4 * k * d_out)
            flops += 4 * d_in**2 * d_out + 4 * d_in * d_out * k
            if optimal:
                # columns are solved one by one on their supports, with few bits of nearly all atoms, and some again
                flops += 3 * d_out * k**3 / 3
        # what is packed stays until it is written, once as an array and once as bytes
        core = Cost({PRODUCT: n_layers * flops})
        memory = NUMPY + packed + max(packed, at_once) + (COMPILED if optimal else 0)
        return Work(memory, 1, core, disk=packed, moved=packed)

    def assemble(self, size: float | None = None, *, embedding_methods: Collection[str] = ()) -> Work:
        """Copying tensors a shard of 5 GiB at a time, and rounding embeddings; `size`, bytes of all, is by default the
        dense model's.
        """
        size = 2 * self.shapes.parameters if size is None else size
        # pages of the file beside what becomes of them, for the pieces and for the whole; 4 million numbers a second
        rounded = self.shapes.embedding_parameters if embedding_methods else 0
        memory, seconds = NUMPY + 1.1 * min(size, 5 * 2**30) + 4 * rounded, rounded / 4e6
        if any(ROUNDINGS[method].learned for method in embedding_methods):
            # one matrix, of whose numbers 32 bytes are in memory at once; 2 million a second
            memory += 32 * self.shapes.vocabulary * self.shapes.hidden_size
            seconds = rounded / 2e6
        return Work(memory, 2, Cost({LOOP: seconds}), disk=size, moved=2 * size)

    def export(self) -> Work:
        """As `assemble`, with one tensor at a time in float32, twice; a temporary file holds the rest."""
        size, embedding = 2 * self.shapes.parameters, 4 * self.shapes.embedding_parameters
        return Work(TORCH + 3 * embedding, 10, Cost({LOOP: size / 1e8}), disk=2 * size, moved=3 * size)

    def evaluate(self, packed: bool = True, *, whole: bool = False) -> Work:
        """The model in memory, `whole` or as far as a device map lets it, forward passes over text and documents."""
        evaluation, shapes = self._evaluation, self.shapes
        perplexity = evaluation["perplexity"] or {"window": 2048, "max_tokens": 0}
        logits = (3 if packed else 2) * 4 * evaluation["batch_size"] * perplexity["window"] * shapes.vocabulary
        tokens = perplexity["max_tokens"] or (1_000_000 if evaluation["perplexity"] else 0)
        flops = 2 * shapes.parameters * tokens
        if perplexity.get("kl"):  # the head once more
            flops += 2 * shapes.vocabulary * shapes.hidden_size * tokens
        document = _QUESTION_TOKENS * (1 + evaluation["num_fewshot"])
        if evaluation["batch_size"] == 1:  # read once for all answers (`evaluation.contexts`)
            document += _ANSWERS * _ANSWER_TOKENS
        else:
            document = _ANSWERS * (document + _ANSWER_TOKENS)
        documents = len(evaluation["tasks"]) * (evaluation["limit"] or _TASK_DOCUMENTS)
        tokens += document * documents
        flops += 2 * shapes.parameters * document * documents
        if evaluation["generate"]:
            generate = evaluation["generate"]
            flops += 10 * 2 * shapes.parameters * len(generate["prompts"]) * generate["max_new_tokens"]
        # unpacked factors, the zeros of the codes among them, are larger than dense weights; a layer is made at a time
        width, read = _value_bytes(evaluation["dtype"]), 4 * shapes.parameters
        weights = 1.5 * width * shapes.parameters + 4 * shapes.layer_parameters
        if not packed:
            weights = 1.3 * width * shapes.parameters
        if evaluation["device_map"] is not None and not whole:
            # at most as large as dense ones, and beside them a few that come from the disk, anew for every batch
            weights, limit = width * shapes.parameters, evaluation["max_memory"]["cpu"]
            held = weights if limit is None else min(weights, nbytes_of(limit))
            read += (weights - held) * tokens / (evaluation["batch_size"] * perplexity["window"])
            weights = held + 2 * width * max(shapes.layer_parameters, shapes.vocabulary * shapes.hidden_size)
        memory = TORCH + weights + logits
        return Work(memory, 7, Cost({FORWARD: flops}), Cost({GPU_FORWARD: flops}), moved=read)

    def search(self, trials: int) -> Work:
        """The model in float32, walked over the windows that are kept out for every trial, with the head once more."""
        shapes, evaluated = self.shapes, self.evaluate(whole=True)
        tokens = self._tokens * self._calibration["heldout_fraction"]
        flops = 2 * (trials + 2) * tokens * (shapes.parameters + shapes.vocabulary * shapes.hidden_size)
        states = 4 * tokens * shapes.hidden_size
        memory = evaluated.memory + 8 * shapes.parameters + states
        return Work(memory, 7, Cost({FORWARD: flops}), Cost({GPU_FORWARD: flops}), moved=4 * shapes.parameters)


def _looked_at(samples: int) -> float:
    """Share of the windows of a training that it does not train on and looks at."""
    held_out = held_out_of(samples)
    return (held_out.stop - held_out.start) / samples


def _before_rounding(method: Method, storage: Mapping[str, Any]) -> float:
    """How many times their bytes in the checkpoint factors take until they are packed: float32, unless settled."""
    return 1.0 if method.own_codec else 32 / FACTOR_CODECS[storage["value_codec"]].bits


def _product(width: int) -> float:
    """Bytes of what is added to a Gram at a time, in float32 (`arrays.add_product`)."""
    return 4 * min(width, PRODUCT_ROWS) * width


def _value_bytes(dtype: str) -> int:
    """Bytes a value; ``auto`` may be either, and a job may run on another machine than the one that plans."""
    return 2 if dtype in ("bfloat16", "float16") else 4
