"""Resources: what a job of each stage needs, from matrix shapes and measured rates.

Rates and constants are fitted to the benchmark files of the demo run (SmolLM2-135M, 64 windows of 512 tokens, one or
two virtual cores of an AMD EPYC with AVX-512) and to `benchmarks/`; what that fit leaves open, other processors and
larger models, is what `SLACK` and `SPARE` are for. `cospadi.needs` prints the result as a table, beside what a
finished run measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEBI = 2**20

# What a job may take above its estimate before it is killed and submitted again with more
SLACK = 4.0  # of time
SPARE = 1.5  # of memory
START_MINUTES = 5
# A SLURM job is two Snakemake processes before it is the stage's own: measured 123 and 135 MB
JOB_MEMORY = 300 * MEBI

# Operations a second of one core. Measured in the demo: forward passes 35 G in bfloat16 on AVX-512, 53 G in float32 on
# AVX2 (AMD EPYC Milan), Grams 120 G, the products of htp 43 to 48 G, eigenvectors and triangular solves of svd_llm 15
# to 18 G; K-SVD 17 to 20 G (benchmarks/README.md).
FORWARD = 30e9
GRAM = 80e9
PRODUCT = 40e9
FACTOR = 15e9
KSVD = 15e9
READ = 100e6  # bytes a second of a slow shared file system
# NumPy's elementwise work stays on one core: assumed, eight threads do the work of five
THREAD_EXPONENT = 0.8
# Operations a second of one GPU of a data centre. Assumed, not measured: a tenth of what an A100 can do in bfloat16,
# and a quarter of what it can in float32
GPU_FORWARD = 30e12
GPU_PRODUCT = 5e12
# documents of a task of lm-eval, with four answers and 120 tokens each: the mean of the paper's
TASK_TOKENS = 4 * 120
TASK_DOCUMENTS = 3500

_NUMPY = 110 * MEBI  # a process with NumPy, SciPy, numba and h5py
_TORCH = 600 * MEBI  # and with torch and transformers


@dataclass(frozen=True)
class Work:
    """What one job does: bytes at the peak of memory, seconds that neither threads nor a GPU shorten (start, reading,
    writing), seconds of one core for the rest or of one GPU, bytes it writes.
    """

    memory: float
    fixed: float
    core: float = 0.0
    gpu: float = 0.0
    disk: float = 0.0

    def mem_mb(self, attempt: int = 1) -> int:
        """Memory to ask for, in MiB."""
        return attempt * math.ceil((JOB_MEMORY + SPARE * self.memory) / MEBI)

    def runtime(self, attempt: int = 1, threads: int = 1, gpu: bool = False) -> int:
        """Time limit to ask for, in minutes."""
        return attempt * (START_MINUTES + math.ceil(SLACK * self.wall(threads, gpu) / 60))

    def wall(self, threads: int = 1, gpu: bool = False) -> float:
        """Expected seconds."""
        return self.fixed + (self.gpu if gpu else self.core / threads**THREAD_EXPONENT)


class Shapes:
    """Sizes by ``config.json``, for estimates alone; the true list of matrices is `structure.inspect_model`'s."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.hidden_size = hidden = config["hidden_size"]
        self.vocabulary = config["vocab_size"]
        self.n_layers = config["num_hidden_layers"]
        inner, heads = config["intermediate_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
        self.matrices = {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        self.site_widths = (hidden, queries, hidden, inner)
        self.gram_entries = sum(width**2 for width in self.site_widths)
        self.layer_parameters = sum(d_in * d_out for d_in, d_out in self.matrices.values())
        self.embedding_parameters = self.vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
        self.parameters = self.n_layers * self.layer_parameters + self.embedding_parameters


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
        """Copying the model; a GGUF is dequantized to float32 before it is written as bfloat16."""
        size = 2 * self.shapes.parameters
        memory = _TORCH + (4 * size if self._source == "wheel_gguf" else 0)
        return Work(memory, 60 + size / (READ / 10), disk=size)

    def inspect(self) -> Work:
        """Headers alone."""
        return Work(_TORCH, 10)

    def prepare(self) -> Work:
        """Tokenizing a text takes seconds; sampling from the model is a forward pass a token."""
        disk = 5 * self._tokens
        if self._calibration["source"] != "self":
            return Work(2 * _NUMPY + 100 * disk, 10, disk=disk)
        # one token of each window at a time: assumed, a quarter of the speed of a long forward pass
        core = 8 * self.shapes.parameters * self._tokens / FORWARD
        return Work(_TORCH + 2.2 * self._width * self.shapes.parameters, 15, core, disk=disk)

    def collect(self, n_layers: int) -> Work:
        """A forward pass of a chunk over all windows; in mode ``stream`` its Grams too."""
        shapes, batch = self.shapes, max(self._calibration["batch_tokens"], self._calibration["length"])
        weights = self._width * (n_layers * shapes.layer_parameters + shapes.embedding_parameters)
        # the pages of the mapped file count beside the tensors read from it; HDF5 keeps a MiB a dataset
        weights = 2 * weights + 4 * MEBI * n_layers
        forward = 16 * 4 * batch * max(shapes.site_widths)
        hidden = self._width * self._tokens * shapes.hidden_size
        flops = 2 * n_layers * self._tokens * shapes.layer_parameters
        memory = _TORCH + weights + hidden + forward
        if self._calibration["mode"] == "store":
            disk = hidden + self._width * self._tokens * sum(shapes.site_widths) * n_layers
            return Work(memory, 15 + disk / READ, flops / FORWARD, flops / GPU_FORWARD, disk)
        grams = 8 * n_layers * shapes.gram_entries
        products = 2 * n_layers * self._tokens * shapes.gram_entries
        return Work(
            memory + grams + 2 * 4 * max(shapes.site_widths) ** 2,
            15 + (grams + hidden) / READ,
            flops / FORWARD + products / GRAM,
            flops / GPU_FORWARD + products / GPU_PRODUCT,
            grams + hidden,
        )

    def gram(self) -> Work:
        """Grams of one layer from its rows, or taken over from the streamed ones."""
        widest, grams = max(self.shapes.site_widths), 8 * self.shapes.gram_entries
        memory = _NUMPY + 3 * 8 * widest**2 + 64 * MEBI
        if self._calibration["mode"] == "stream":
            return Work(memory, 1 + 2 * grams / READ, disk=grams)
        rows = self._width * self._tokens * sum(self.shapes.site_widths)
        return Work(memory, 1 + (grams + rows) / READ, 2 * self._tokens * self.shapes.gram_entries / GRAM, disk=grams)

    def prune(self, walks: int = 1, n_kept: int = 8) -> Work:
        """Walks over all blocks; `n_kept` hidden-size-squared float64 moments are in memory."""
        shapes = self.shapes
        blocks = self._calibration["blocks_per_job"] or shapes.n_layers
        weights = self._width * (blocks * shapes.layer_parameters + shapes.embedding_parameters)
        hidden = 2 * self._width * self._tokens * shapes.hidden_size
        states = 8 * 256 * shapes.n_layers * shapes.hidden_size
        memory = _TORCH + 2 * weights + hidden + states + n_kept * 8 * shapes.hidden_size**2
        flops = 4 * walks * self._tokens * shapes.n_layers * shapes.layer_parameters
        return Work(memory, 15, flops / FORWARD, flops / GPU_FORWARD)

    def learn(self, settings: Mapping[str, Any], n_layers: int = 1, *, whole_model: bool = False) -> Work:
        """Learning a unit of `n_layers` layers, problem after problem; `whole_model`: all matrices at once."""
        matrices = _targets(self.shapes, settings)
        problems = _problems(matrices, settings, n_layers)
        core = sum(_learning_seconds(d_in, d_out, settings) for d_in, d_out in problems)
        sizes = [d_in * d_out for d_in, d_out in matrices.values()]
        factors = 4 * (1 - settings["ratio"]) * n_layers * sum(sizes)
        if whole_model:
            # one projection of a group in double precision, twice; where the groups are parted is not known yet
            mean_group = n_layers / (settings.get("groups") or -(-n_layers // 3))
            widest = max(d_in for d_in, _ in matrices.values())
            at_once = 20 * min(n_layers, 3 * mean_group) * max(sizes) + 10 * 8 * widest**2
        else:
            at_once = max(_learning_bytes(d_in, d_out, settings) for d_in, d_out in problems)
        # only the products move to a GPU: eigenvectors and whitening stay where they are, a quarter of the time
        gpu = core * (0.25 / 8**THREAD_EXPONENT + PRODUCT / GPU_PRODUCT)
        return Work(_NUMPY + factors + at_once, 1 + factors / READ, core, gpu, factors)

    def quantize(self, settings: Mapping[str, Any], n_layers: int = 1) -> Work:
        """Packing a unit, matrix after matrix, with the error of what is stored (float64)."""
        matrices, ratio = _targets(self.shapes, settings), settings["ratio"]
        packed = 2 * (1 - ratio) * n_layers * sum(d_in * d_out for d_in, d_out in matrices.values())
        at_once, flops = 0.0, 0.0
        for d_in, d_out in matrices.values():
            k = _n_atoms(d_in, d_out, settings)
            at_once = max(at_once, 2 * 8 * d_in**2 + 4 * 8 * d_in * d_out + 4 * 4 * k * d_out)
            flops += 4 * d_in**2 * d_out + 4 * d_in * d_out * k
        # rounding in the metric goes through the atoms one by one
        optimal = settings.get("codes", {}).get("rounding") == "optimal"
        core = n_layers * flops * (4 if optimal else 1) / FACTOR
        return Work(_NUMPY + 2 * packed + at_once, 1 + packed / READ, core, disk=packed)

    def assemble(self) -> Work:
        """Copying tensors a shard of 5 GiB at a time."""
        size = 2 * self.shapes.parameters
        return Work(_NUMPY + 2 * min(size, 5 * 2**30), 5 + 2 * size / READ, disk=size)

    def evaluate(self) -> Work:
        """The whole model in memory, forward passes over held-out text and the tasks' documents."""
        evaluation, shapes = self._evaluation, self.shapes
        perplexity = evaluation["perplexity"] or {"window": 2048, "max_tokens": 0}
        logits = 3 * 4 * evaluation["batch_size"] * perplexity["window"] * shapes.vocabulary
        tokens = perplexity["max_tokens"] or (1_000_000 if evaluation["perplexity"] else 0)
        documents = evaluation["limit"] or TASK_DOCUMENTS
        tokens += TASK_TOKENS * documents * len(evaluation["tasks"])
        flops = 2 * shapes.parameters * tokens
        if evaluation["generate"]:
            generate = evaluation["generate"]
            flops += 10 * 2 * shapes.parameters * len(generate["prompts"]) * generate["max_new_tokens"]
        # unpacked factors, the zeros of the codes among them, are larger than dense weights; a layer is made at a time
        width = _value_bytes(evaluation["dtype"])
        memory = _TORCH + 1.5 * width * shapes.parameters + 4 * shapes.layer_parameters + logits
        return Work(memory, 20 + 4 * shapes.parameters / READ, flops / FORWARD, flops / GPU_FORWARD)


def _value_bytes(dtype: str) -> int:
    """Bytes a value; ``auto`` may be either, and a job may run on another machine than the one that plans."""
    return 2 if dtype in ("bfloat16", "float16") else 4


def _targets(shapes: Shapes, settings: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Projection to shape (d_in, d_out), of those that a variant factorizes."""
    chosen = settings.get("targets") or shapes.matrices
    return {name: shape for name, shape in shapes.matrices.items() if name in chosen}


def _problems(
    matrices: Mapping[str, tuple[int, int]], settings: Mapping[str, Any], n_layers: int
) -> Sequence[tuple[int, int]]:
    """Shapes that a unit's solver sees: matrices that share a dictionary stand side by side (`learning`)."""
    share, bundles = settings.get("share") or (), settings.get("share_within") or ()
    bundle_of = {name: number for number, bundle in enumerate(bundles) for name in bundle}
    widths: dict[tuple[Any, ...], int] = {}
    for layer in range(n_layers):
        for name, (d_in, d_out) in matrices.items():
            key = ("all" if name in share else layer, bundle_of.get(name, name), d_in)
            widths[key] = widths.get(key, 0) + d_out
    return [(key[2], d_out) for key, d_out in widths.items()]


def _n_atoms(d_in: int, d_out: int, settings: Mapping[str, Any]) -> int:
    """Number of atoms that meets the budget, to a percent (`budget` counts bytes exactly)."""
    codes = settings.get("codes", {})
    value = (codes.get("value_bits") or 16) / 8
    atom = (codes.get("dictionary_bits") or 16) / 8
    allowed = 2 * (1 - settings["ratio"]) * d_in * d_out
    if "rho" not in settings:
        return max(1, round(allowed / (atom * d_in + value * d_out)))
    return max(1, round(allowed / (atom * d_in + value * d_out / settings["rho"] + d_out / 8)))


def _learning_bytes(d_in: int, d_out: int, settings: Mapping[str, Any]) -> float:
    """Peak of one problem: Gram and whitening factor in float64, the solver's codes and signals in float32."""
    k, square = _n_atoms(d_in, d_out, settings), 8 * d_in**2
    # measured by tracemalloc for htp: 12, 45 and 22 MiB for 576 x 576, 576 x 1536 and 1536 x 576; this gives 13, 44, 29
    solver = 8 * 4 * k * d_out + 6 * 4 * d_in * d_out
    error = 3 * 8 * d_in * d_out  # measured in float64 once the solver is done
    return 3 * square + 2 * 4 * d_in * d_out + max(solver + 3 * 8 * min(d_in, d_out) ** 2, error)


def _learning_seconds(d_in: int, d_out: int, settings: Mapping[str, Any]) -> float:
    """Seconds of one core for one problem: its cubic terms at the rates above."""
    k, d, n = _n_atoms(d_in, d_out, settings), d_in, d_out
    whitening = d**3 / 3 + 2 * d * d * n
    error = 4 * d * d * n
    eigenvectors = 10 * min(d, n) ** 3
    if "rho" not in settings:  # low rank
        return (whitening + error + eigenvectors + 2 * d * n * k) / FACTOR
    rounds, solver = settings.get("max_iter"), settings.get("solver", "htp")
    if solver == "ksvd":
        # pursuit: Gram rows against every column; sweep: eight power iterations, two products each, and the update
        s = k / settings["rho"]
        return (rounds or 60) * n * s * (k * s + 36 * d) / KSVD + (whitening + error) / FACTOR
    conjugate_gradients, pursuit_and_dictionary = 3, 2
    a_round = 2 * n * k * k * (conjugate_gradients + pursuit_and_dictionary) + 6 * n * k * d + 2 * k * k * d + k**3 / 3
    start = 3 * (4 * n * k * d + 20 * k * k * d)
    return ((rounds or 25) * a_round + 20 * n * k * k) / PRODUCT + (whitening + error + eigenvectors + start) / FACTOR
