"""The stages of a run that compresses a model, in the order of the workflow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import filterfalse
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from cospadi.digests import code_digest, modules_of
from cospadi.formats.values import modules_of as formats_of
from cospadi.methods import METHODS
from cospadi.methods.base import MEASURED
from cospadi.methods.choose import INCREASE, SEARCH
from cospadi.plan.names import layers_of
from cospadi.plan.variants import Variants
from cospadi.resources import Estimates
from cospadi.stages import Jobs, Stage, fetch_text, report, table_of
from cospadi.work import MEBI, Work

if TYPE_CHECKING:
    from cospadi.plan import Plan


def _estimated(estimate: Callable[[Estimates], Work]) -> Callable[[Plan, Any], Work]:
    """The `work` of a stage that follows from the model and the config alone."""
    return lambda plan, wildcards: estimate(plan.estimates)


def _each_base(rule: str, bases: Callable[[Plan], Iterable[str]]) -> Callable[[Plan], Iterator[Jobs]]:
    """One job for each of some bases."""

    def jobs(plan: Plan) -> Iterator[Jobs]:
        for base in bases(plan):
            yield Jobs(1, f"{base}{rule}.tsv", SimpleNamespace(base=base), base)

    return jobs


def _asked_for(plan: Plan) -> Iterator[Jobs]:
    """No job is part of a run."""
    return iter(())


def _fetch_model(plan: Plan) -> Iterator[Jobs]:
    if plan.config["model"]["source"] != "local":
        yield Jobs(1, "fetch_model.tsv")


def _fetch_text(plan: Plan) -> Iterator[Jobs]:
    if plan.text_file("calibration") or plan.text_file("heldout"):
        yield Jobs(1, "fetch_text/*.tsv")


def _prepare(plan: Plan) -> Iterator[Jobs]:
    if plan.inspected_bases():
        yield Jobs(1, "prepare_calibration.tsv")


def _more_samples(plan: Plan) -> list[int]:
    found = (plan.more_samples(name, option) for name in plan.factorized for option in ("compensate", "distill"))
    return sorted({samples for samples in found if samples is not None})


def _prepare_more(plan: Plan) -> Iterator[Jobs]:
    for samples in _more_samples(plan):
        yield Jobs(1, f"prepare_windows/{samples}.tsv", SimpleNamespace(samples=samples))


def _pruning(rule: str) -> Callable[[Plan], Iterator[Jobs]]:
    """One job in a run that removes blocks."""
    return lambda plan: iter([Jobs(1, f"{rule}.tsv", SimpleNamespace(base=""))] if plan.pruned_bases else [])


def _fitted(plan: Plan) -> list[str]:
    return [base for base in plan.pruned_bases if plan.fits(base)]


def _drifting(plan: Plan) -> list[str]:
    return list(dict.fromkeys(plan.base_of(name) for name in plan.factorized if plan.learns_model(name)))


def _each_chunk(rule: str, bases: Callable[[Plan], Iterable[str]]) -> Callable[[Plan], Iterator[Jobs]]:
    """One job for each chunk of layers of some bases."""

    def jobs(plan: Plan) -> Iterator[Jobs]:
        for base in bases(plan):
            chunks = plan.chunks_of(base)
            widest = max(chunks, key=len)
            wildcards = SimpleNamespace(base=base, first=widest[0], last=widest[-1])
            yield Jobs(len(chunks), f"{base}{rule}/*.tsv", wildcards, base)

    return jobs


def _gram(plan: Plan) -> Iterator[Jobs]:
    for base in plan.learned_bases():
        wildcards = SimpleNamespace(base=base, layer=0)
        yield Jobs(plan.n_layers_of(base), f"{base}compute_gram/*.tsv", wildcards, base)


def _each_variant(rule: str, variants: Callable[[Plan], Iterable[str]]) -> Callable[[Plan], Iterator[Jobs]]:
    """One job for each of some variants."""

    def jobs(plan: Plan) -> Iterator[Jobs]:
        for variant in variants(plan):
            yield Jobs(1, f"{rule}/{variant}.tsv", SimpleNamespace(variant=variant), variant)

    return jobs


def _each_unit(rule: str, variants: Callable[[Plan], Iterable[str]]) -> Callable[[Plan], Iterator[Jobs]]:
    """One job for each unit of some variants."""

    def jobs(plan: Plan) -> Iterator[Jobs]:
        for variant in variants(plan):
            units = plan.units(variant)
            wildcards = SimpleNamespace(variant=variant, unit=units[0])
            yield Jobs(len(units), f"{rule}/{variant}/*.tsv", wildcards, variant)

    return jobs


def _of_unit(estimate: Callable[[Estimates, Mapping[str, Any], int], Work]) -> Callable[[Plan, Any], Work]:
    """The `work` of a stage that follows from a variant's settings and the layers of a unit."""
    return lambda plan, wildcards: estimate(
        plan.estimates, plan.factorizing(wildcards.variant), len(layers_of(wildcards.unit))
    )


def _parting(plan: Plan) -> list[str]:
    return [variant for variant in plan.factorized if plan.allocates(variant)]


def _measuring(plan: Plan) -> list[str]:
    return [variant for variant in _parting(plan) if not plan.allocation_file(variant)]


def _assemble(plan: Plan) -> Iterator[Jobs]:
    if packed := plan.factorized + plan.choosing:
        yield Jobs(len(packed), "assemble_model/*.tsv")


def _assembling(plan: Plan, wildcards: Any) -> Work:
    # of the largest; where no ratio says how large it will be, of the dense model
    sizes = [plan.final_nbytes(name) for name in plan.factorized + plan.choosing]
    rounded = [plan.embedding(name) for name in plan.factorized + plan.choosing]
    methods = {method for bits, method in rounded if bits < 16}
    return plan.estimates.assemble(None if None in sizes else max(sizes), embedding_methods=methods)


def _choosing(plan: Plan, wildcards: Any) -> Work:
    """Numbers are compared; where perplexity is the target, or swaps are tried, the model is walked too."""
    settings = plan.config["variants"][wildcards.variant]
    if SEARCH in settings:
        return plan.estimates.search(settings[SEARCH])
    return plan.estimates.evaluate(whole=True) if INCREASE in settings else Work(300 * MEBI, 30)


def _choosing_code(plan: Plan, wildcards: Any) -> str:
    measured = {INCREASE, SEARCH} & plan.config["variants"][wildcards.variant].keys()
    return code_digest("cospadi.choosing", *(["cospadi.evaluation.parts"] if measured else []))


def _evaluate(plan: Plan) -> Iterator[Jobs]:
    yield Jobs(len(plan.variants), "evaluate_model/*.tsv")


# the runtime is inside every model that uses it: when it changes, that is assembled anew
def _evaluation_code(plan: Plan, wildcards: Any) -> str:
    return code_digest("cospadi.evaluation.evaluate", without="cospadi.runtime", data="evaluation/task_files")


def _walks(plan: Plan, wildcards: Any) -> Work:
    # one walk to choose; to fit, one of the model as it is and of what is left for every cut
    settings = plan.pruned_bases.get(getattr(wildcards, "base", ""))
    return plan.estimates.prune(2 * settings.get("cuts", 1) if settings else 1)


def _learning_code(plan: Plan, wildcards: Any, *more: str) -> str:
    """Of a variant its method and solver, and not those of other variants; who reads its allocation, if it has one."""
    settings = plan.factorizing(wildcards.variant)
    modules = METHODS[settings["method"]].modules(settings)
    reader = ["cospadi.profiles"] * plan.allocates(wildcards.variant)
    return code_digest("cospadi.learning", *more, *reader, *modules, *formats_of(settings))


def _profiling_code(plan: Plan, wildcards: Any) -> str:
    measured = plan.factorizing(wildcards.variant)["allocation"] == MEASURED
    return _learning_code(plan, wildcards, *["cospadi.calibration.alone"] * measured)


def _of_variant(*modules: str) -> Callable[[Plan, Any], str]:
    """The code of a stage that packs a variant or writes it: other codecs and supports than its own do not count."""

    def code(plan: Plan, wildcards: Any) -> str:
        formats = [module for settings in plan.packed(wildcards.variant) for module in formats_of(settings)]
        return code_digest(*modules, *dict.fromkeys(formats))

    return code


STAGES = table_of(
    Stage(
        name="fetch",
        rule="fetch_model",
        result="the model, as a Hugging Face folder",
        jobs=_fetch_model,
        work=_estimated(Estimates.fetch),
        code=("cospadi.sources.models", "cospadi.sources.rotation"),
        threads="fetch",
    ),
    fetch_text(_fetch_text, "articles, parted into calibration and held-out ones"),
    Stage(
        name="inspect",
        rule="inspect_model",
        result="layers, matrices, and which of them read the same input",
        after=("fetch", "prune"),
        jobs=_each_base("inspect_model", Variants.inspected_bases),
        work=_estimated(Estimates.inspect),
        code=("cospadi.structure",),
    ),
    Stage(
        name="prepare",
        rule="prepare_calibration",
        result="windows of tokens",
        after=("fetch", "text"),
        jobs=_prepare,
        work=_estimated(Estimates.prepare),
        code=("cospadi.calibration.windows",),
        threads="prepare",
    ),
    Stage(
        name="more",
        rule="prepare_windows",
        result="more windows, to train on end to end",
        files="windows/*.h5",
        only="training end to end",
        after=("fetch", "text"),
        jobs=_prepare_more,
        work=lambda plan, wildcards: plan.estimates.prepare(int(wildcards.samples)),
        code=("cospadi.calibration.windows",),
        threads="prepare",
    ),
    Stage(
        name="distances",
        rule="measure_distances",
        result="how far blocks move the hidden state",
        only="without some blocks",
        after=("fetch", "inspect", "prepare"),
        jobs=_pruning("measure_distances"),
        work=_walks,
        code=("cospadi.pruning.distances",),
        threads="prune",
        uses_gpu=True,
    ),
    Stage(
        name="select",
        rule="select_blocks",
        result="the blocks that go",
        only="without some blocks",
        after=("inspect", "prepare", "distances"),
        jobs=_each_base("select_blocks", lambda plan: plan.pruned_bases),
        work=Work(300 * MEBI, 10),
        code=("cospadi.pruning.selection",),
    ),
    Stage(
        name="fit",
        rule="fit_transforms",
        result="linear maps that make up for them",
        only="without some blocks",
        after=("fetch", "inspect", "prepare", "select"),
        jobs=_each_base("fit_transforms", _fitted),
        work=_walks,
        code=("cospadi.pruning.fitting",),
        threads="prune",
        uses_gpu=True,
    ),
    Stage(
        name="prune",
        rule="prune_model",
        result="a model of fewer blocks",
        files="{of}model/*",
        only="without some blocks",
        after=("fetch", "inspect", "prepare", "select", "fit"),
        jobs=_each_base("prune_model", lambda plan: plan.pruned_bases),
        work=_estimated(Estimates.assemble),
        code=("cospadi.pruning.folding",),
        threads="assemble",
    ),
    Stage(
        name="collect",
        rule="collect_activations",
        result="what enters every matrix of a chunk of layers",
        files="{of}hidden/*.h5",
        after=("fetch", "prune", "inspect", "prepare", "collect"),  # a chunk after the one before
        jobs=_each_chunk("collect_activations", Variants.learned_bases),
        work=lambda plan, wildcards: plan.estimates.collect(int(wildcards.last) - int(wildcards.first) + 1),
        code=("cospadi.calibration.collect",),
        threads="collect",
        uses_gpu=True,
        priority=2,  # the next chunk before the layers of this one: it wants more cores, and they are free together now
    ),
    Stage(
        name="gram",
        rule="compute_gram",
        result="second moments of that, layer by layer",
        files="{of}gram/*.h5",
        after=("inspect", "prepare", "collect"),
        jobs=_gram,
        work=_estimated(Estimates.gram),
        # activations are temporary: once they are gone, Snakemake cannot see that their rule changed
        code=("cospadi.gram", "cospadi.calibration.collect"),
        threads="gram",
    ),
    Stage(
        name="gradients",
        rule="collect_gradients",
        result="what errors in every matrix of a chunk cost the loss",
        files="{of}gradients/layers_*.h5",
        only="gradients as metric",
        after=("fetch", "prune", "inspect", "prepare", "collect", "gradients"),  # a chunk after the one behind
        jobs=_each_chunk("collect_gradients", Variants.gradient_bases),
        work=lambda plan, wildcards: plan.estimates.gradients(int(wildcards.last) - int(wildcards.first) + 1),
        code=("cospadi.calibration.gradients",),
        threads="collect",
        uses_gpu=True,
        priority=2,
    ),
    Stage(
        name="head",
        rule="measure_head",
        result="what errors in the last matrix cost the loss",
        files="{of}head.h5",
        only="embeddings by what errors cost",
        after=("fetch", "prune", "inspect", "prepare", "collect"),
        jobs=_each_base("measure_head", Variants.head_bases),
        work=_estimated(Estimates.head),
        code=("cospadi.calibration.head",),
        threads="collect",
        uses_gpu=True,
    ),
    Stage(
        name="drift",
        rule="measure_drift",
        result="how far blocks move the predicted token",
        only="all layers at once",
        after=("fetch", "prune", "inspect", "prepare"),
        jobs=_each_base("measure_drift", _drifting),
        work=_walks,
        code=("cospadi.pruning.drift",),
        threads="prune",
        uses_gpu=True,
    ),
    Stage(
        name="profile",
        rule="profile_matrices",
        result="what bytes are worth to the matrices of a unit",
        only="bytes by matrix",
        after=("fetch", "prune", "inspect", "prepare", "gram", "gradients"),
        jobs=_each_unit("profile_matrices", _measuring),
        work=_of_unit(Estimates.profile),
        code=_profiling_code,
        threads="learn",
        uses_gpu=True,
        priority=1,  # their variant is learned after it
    ),
    Stage(
        name="allocate",
        rule="allocate_bytes",
        result="bytes of every matrix of a variant",
        only="bytes by matrix",
        after=("inspect", "prepare", "profile"),
        jobs=_each_variant("allocate_bytes", _parting),
        work=lambda plan, wildcards: Work(300 * MEBI, 30),
        code=_learning_code,
    ),
    Stage(
        name="learn",
        rule="learn_dictionary",
        result="factors of a unit of layers",
        files="{of}/factors/*.safetensors",
        after=("fetch", "prune", "inspect", "prepare", "gram", "gradients", "drift", "allocate"),
        jobs=_each_unit("learn_dictionary", lambda plan: filterfalse(plan.learns_in_turn, plan.factorized)),
        work=_of_unit(Estimates.learn),
        code=_learning_code,
        threads="learn",
        uses_gpu=True,
        priority=None,
    ),
    Stage(
        name="in_turn",
        rule="learn_in_turn",
        result="factors of a unit, fitted to what those before it give, or refined",
        files="{of}/factors/*.safetensors",
        only="layers in turn",
        # a unit after the one before
        after=("fetch", "prune", "inspect", "prepare", "more", "gram", "gradients", "allocate", "in_turn"),
        jobs=_each_unit("learn_in_turn", lambda plan: filter(plan.learns_in_turn, plan.factorized)),
        work=_of_unit(Estimates.learn_in_turn),
        code=lambda plan, wildcards: _learning_code(plan, wildcards, "cospadi.handing"),
        threads="collect",
        uses_gpu=True,
        priority=1,  # the next unit waits for it
    ),
    Stage(
        name="distill",
        rule="distill_factors",
        result="factors of all units, trained to predict what the dense model predicts",
        files="{of}/distilled/*.safetensors",
        only="training end to end",
        after=("fetch", "prune", "inspect", "prepare", "more", "learn", "in_turn"),
        jobs=_each_variant("distill_factors", lambda plan: filter(plan.distills, plan.factorized)),
        work=lambda plan, wildcards: plan.estimates.distill(plan.factorizing(wildcards.variant)),
        code=_of_variant("cospadi.distillation"),
        threads="collect",
        uses_gpu=True,
        priority=1,  # all units of its variant wait for it
    ),
    Stage(
        name="quantize",
        rule="quantize_codes",
        result="the packed tensors of the checkpoint",
        files="{of}/codes/*.safetensors",
        after=("fetch", "prune", "inspect", "prepare", "gram", "gradients", "learn", "in_turn", "distill"),
        jobs=_each_unit("quantize_codes", lambda plan: plan.factorized),
        work=_of_unit(Estimates.quantize),
        code=_of_variant("cospadi.quantization"),
        threads="quantize",
    ),
    Stage(
        name="choose",
        rule="choose_variants",
        result="the variant that each matrix is taken from",
        only="parts of variants",
        after=("fetch", "prepare", "learn", "in_turn", "quantize"),
        jobs=_each_variant("choose_variants", lambda plan: plan.choosing),
        work=_choosing,
        code=_choosing_code,
        threads="evaluate",
        uses_gpu=True,
    ),
    Stage(
        name="take",
        rule="take_unit",
        result="the same tensors, in the place of its own",
        only="parts of variants",
        after=("fetch", "learn", "in_turn", "quantize", "choose"),
        jobs=_each_unit("take_unit", lambda plan: plan.choosing),
        work=Work(1000 * MEBI, 30),
        code=_of_variant("cospadi.choosing"),
    ),
    Stage(
        name="assemble",
        rule="assemble_model",
        result="a packed Hugging Face folder",
        files="*/model/*.safetensors",
        after=("fetch", "prune", "prepare", "head", "quantize", "take"),
        jobs=_assemble,
        work=_assembling,
        # all of the runtime travels in the folder
        code=_of_variant("cospadi.checkpoint", *modules_of("cospadi.runtime")),
        threads="assemble",
    ),
    Stage(
        name="densify",
        rule="densify",
        result="the same as an ordinary dense folder",
        only="asked for",
        after=("assemble",),
        jobs=_asked_for,
        work=_estimated(Estimates.assemble),
        code=_of_variant("cospadi.checkpoint"),
        threads="assemble",
    ),
    Stage(
        name="gguf",
        rule="export_gguf",
        result="one GGUF file",
        only="asked for",
        after=("assemble",),
        jobs=_asked_for,
        work=_estimated(Estimates.export),
        code=_of_variant("cospadi.exports.gguf"),
        threads="assemble",
    ),
    Stage(
        name="compressed_tensors",
        rule="export_compressed_tensors",
        result="integers as a compressed-tensors folder",
        only="asked for",
        after=("assemble",),
        jobs=_asked_for,
        work=_estimated(Estimates.assemble),
        code=_of_variant("cospadi.exports.compressed_tensors"),
        threads="assemble",
    ),
    Stage(
        name="evaluate_dense",
        rule="evaluate_dense",
        result="perplexity, tasks, generated text of the model as fetched",
        after=("fetch", "text", "inspect"),
        work=lambda plan, wildcards: plan.estimates.evaluate(packed=False),
        code=_evaluation_code,
        threads="evaluate",
        uses_gpu=True,
        gpus="evaluation",
        priority=1,  # all other evaluations wait for it
    ),
    Stage(
        name="evaluate",
        rule="evaluate_model",
        result="perplexity, tasks, generated text",
        after=("fetch", "text", "prune", "assemble", "evaluate_dense"),
        jobs=_evaluate,
        work=_estimated(Estimates.evaluate),
        code=_evaluation_code,
        threads="evaluate",
        uses_gpu=True,
        gpus="evaluation",
    ),
    Stage(
        name="plot_distances",
        rule="plot_distances",
        result="a plot of the distances",
        only="without some blocks",
        after=("inspect", "prepare", "distances"),
        jobs=_pruning("plot_distances"),
        code=("cospadi.report.plots",),
    ),
    Stage(
        name="summarize",
        rule="summarize",
        result="table, plots, generated texts side by side",
        after=(
            *("fetch", "prune", "learn", "in_turn", "distill", "quantize", "take"),
            *("assemble", "evaluate_dense", "evaluate"),
        ),
        code=("cospadi.report",),
    ),
    report("summarize", "plot_distances"),
)
