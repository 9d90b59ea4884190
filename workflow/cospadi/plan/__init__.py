"""Plan: which jobs, files and resources follow from a config and the model's ``config.json``.

Everything here is known when the Snakefile is parsed: no weights are read, neither torch nor transformers imported.
`variants` says what is learned from what, and in which parts; `paths` where the files are; `stages` what each stage
does; `faults` what the model cannot give.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from cospadi.digests import code_digest, folder_digest, modules_of
from cospadi.errors import ConfigError
from cospadi.methods.base import AFTERWARDS, EMBEDDINGS
from cospadi.outside import TOKENIZER, edited_digest, model_digest, untimed
from cospadi.plan.budgets import model_nbytes, with_ratios
from cospadi.plan.faults import local_model_faults, planning_faults
from cospadi.plan.names import chunk_name, layers_of, one_of
from cospadi.plan.paths import Paths
from cospadi.plan.stages import STAGES
from cospadi.plan.variants import DENSE
from cospadi.report import closing_message
from cospadi.resources import Estimates, Shapes
from cospadi.sources import needs_template, planning_config, structural
from cospadi.stages import Staged
from cospadi.structure import check_supported

__all__ = ["DENSE", "STAGES", "Plan", "code_digest", "layers_of", "modules_of", "one_of"]

# What takes longer does not share a SLURM job: the six seconds of start-up are under 5 % of it
SMALL_SECONDS = 120.0
# Not more CPUs than `cores` of the profile: the executor's step would ask for more than the job has
SHARED_CPUS = 16


class Plan(Paths, Staged):
    """The jobs of a run that compresses a model.

    Parameters
    ----------
    config : mapping
        Complete, from `config.check_config`.
    model_config : mapping, optional
        Content of the model's ``config.json``; by default what `sources.planning_config` finds. Then the folder of a
        local model is checked too.

    Raises
    ------
    UnsupportedModelError
        If the architecture is none that can be taken apart.
    ConfigError
        With all faults: what the variants, the windows and the tasks ask for and the model cannot give, and what a
        local model's folder lacks.
    """

    stages = STAGES

    def __init__(self, config: Mapping[str, Any], model_config: Mapping[str, Any] | None = None) -> None:
        reads_folder = model_config is None and config["model"]["source"] == "local"
        model_config = planning_config(config["model"]) if model_config is None else model_config
        check_supported(model_config)
        shapes = Shapes(model_config)
        config, faults, told = with_ratios(config, shapes, model_config)
        Staged.__init__(self, config)
        self.told = told
        Paths.__init__(self, config, shapes.n_layers)
        self._model_config = model_config
        self._shapes = shapes
        self._digests: dict[str, str | None] = {}
        self.estimates = Estimates(config, model_config)
        faults += planning_faults(self, shapes, model_config)
        if reads_folder:
            faults += local_model_faults(self.model_folder, shapes, needs_template(config["text"]))
        if faults:
            raise ConfigError(faults)

    # --- what a stage depends on ---------------------------------------------------------------------------------

    def collection(self) -> dict[str, Any]:
        """Settings that decide what is collected."""
        keys = ("mode", "dtype", "batch_tokens", "heldout_fraction")
        return {key: self.config["calibration"][key] for key in keys}

    def pruning(self) -> dict[str, Any]:
        """Settings that decide how the model is walked to remove blocks."""
        return {key: self.config["calibration"][key] for key in ("dtype", "batch_tokens", "blocks_per_job")}

    def windows(self, samples: int | None = None) -> dict[str, Any]:
        """Settings that decide which windows are read: those of the calibration, or so many in place of as many."""
        keys = ["source", "samples", "length", "seed", "packing"]
        # the model that samples them computes in some dtype
        calibration, text = self.config["calibration"], self.config["text"]
        keys += ["dtype"] if calibration["source"] == "self" else []
        shares = [part["share"] for part in text.get("sources", ())] if text and calibration["source"] == "text" else []
        found = {key: calibration[key] for key in keys} | ({"shares": shares} if shares else {})
        return found if samples is None else found | {"samples": samples}

    def learning(self, variant: str, *, rounded: bool = False) -> dict[str, Any]:
        """Settings that decide the factors: rounding comes after them, unless each layer waits for the one before as it
        is `rounded`, and so does training end to end; the bits of a value come before (the budget).
        """
        settings = {key: value for key, value in self.factorizing(variant).items() if key not in AFTERWARDS}
        codes = {key: value for key, value in settings["codes"].items() if rounded or key != "rounding"}
        return {**settings, "codes": codes}

    def storing(self, variant: str) -> dict[str, Any]:
        """Settings that decide the matrices as they are stored: embedding and head are none of them."""
        return {key: value for key, value in self.factorizing(variant).items() if key not in EMBEDDINGS}

    def reported(self) -> dict[str, Any]:
        """Settings that the report shows."""
        return {"variants": self.config["variants"], "evaluation": {"tasks": self.config["evaluation"]["tasks"]}}

    # --- what lies outside ---------------------------------------------------------------------------------------

    @property
    def is_local(self) -> bool:
        """Whether the model is used where it lies."""
        return self.config["model"]["source"] == "local"

    def model_input(self, base: str = "") -> str:
        """A base's model as an input of a rule."""
        folder = self.base_model(base)
        return untimed(folder) if self.is_local and not base else folder

    def model_digest(self, *parts: str, base: str = "") -> list[str | None]:
        """Digests of the parts that a rule reads of a base's model, by which edits in its folder are seen.

        None for a model that a rule made, and for one that was fetched and is as it was then.
        """
        if base:
            return [None] * len(parts)
        digest, folder = (
            (model_digest, self.model_folder) if self.is_local else (edited_digest, self.place(self.model_folder))
        )
        for part in parts:
            if part not in self._digests:
                self._digests[part] = digest(folder, part)
        return [self._digests[part] for part in parts]

    def template_model(self) -> list[str]:
        """The model whose chat template makes text of conversations, as a list that is empty where there are none."""
        return [self.model_input()] if needs_template(self.config["text"]) else []

    def template_digest(self) -> list[str | None]:
        """Digest of what makes text of conversations, where there are any."""
        return self.model_digest(TOKENIZER) if needs_template(self.config["text"]) else []

    def planned_digest(self) -> str:
        """Digest of what the jobs were planned for; a model that is fetched is compared with it."""
        return hashlib.sha256(json.dumps(structural(self._model_config), sort_keys=True).encode()).hexdigest()

    def tasks_digest(self) -> str | None:
        """Digest of the user's own tasks."""
        return folder_digest(self.config["evaluation"]["task_path"])

    def trains_nothing(self, _wildcards: Any) -> list[str]:
        """For who asks for trained models.

        Raises
        ------
        ConfigError
            Always: such a run has another plan.
        """
        raise ConfigError(["training: missing, this run trains nothing; see config/masa-train.yaml"])

    # --- resources -----------------------------------------------------------------------------------------------

    def final_nbytes(self, name: str) -> int | None:
        """Bytes of the weights of model `name`, a variant or ``dense``; None where only the run will tell."""
        variant = None if name == DENSE else self.config["variants"][name]
        return model_nbytes(self.config, variant, self._shapes, self._model_config)

    def group(self, stage: str) -> Callable[..., str | None]:
        """SLURM job that a job of `stage` shares, a function for Snakemake (local runs know no groups).

        Grams are in the job of their chunk's collection, side by side, where they are few and take no longer. Small
        units, each learned and then packed, are all called ``unit``; they run in turn, and the profile's
        ``group-components`` says how many make a job.
        """

        def chunk(wildcards: Any) -> str | None:
            layer = int(wildcards.first if stage == "collect" else wildcards.layer)
            chunk = self.chunk_with(layer, wildcards.base)
            collecting = self.estimates.collect(len(chunk)).wall(
                self.threads("collect"), bool(self.gpus("collect")), self.machine
            )
            cpus = len(chunk) * self.threads("gram")
            if cpus > SHARED_CPUS or self.estimates.gram().wall(machine=self.machine) > max(SMALL_SECONDS, collecting):
                return None
            return f"chunk_{wildcards.base.replace('/', '_')}{chunk_name(chunk)}"

        def unit(wildcards: Any) -> str | None:
            # units that wait for one another are jobs of their own, and so is what packs them
            waits = self.learns_in_turn(wildcards.variant) or self.distills(wildcards.variant)
            small = self.work("learn", wildcards).wall(machine=self.machine) < SMALL_SECONDS
            return "unit" if small and not waits else None

        return chunk if stage in ("collect", "gram") else unit

    def closing_message(self) -> str:
        """What the console shows at the end of a run; nothing where it made no table."""
        return closing_message(self) if self.has_written("summary.json") else ""
