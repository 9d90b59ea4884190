"""Paths: where the files of a run lie, and which of them a job reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cospadi.errors import CospadiError, listed
from cospadi.evaluation import HELDOUT_TASKS
from cospadi.plan.names import chunk_name, filled, layers_of
from cospadi.plan.variants import DENSE, Variants
from cospadi.sources import needs_template
from cospadi.structure import layer_name


class Paths(Variants):
    """Files of a run; what is not there yet has a path too.

    Attributes
    ----------
    results : str
        ``results/<run>``.
    model_folder : str
        The dense model.
    """

    def __init__(self, config: Mapping[str, Any], n_layers: int) -> None:
        super().__init__(config, n_layers)
        model = config["model"]
        self.results = f"results/{config['run']}"
        self.model_folder = model["path"] if model["source"] == "local" else f"resources/models/{model['name']}"

    def model_of(self, name: str) -> str:
        """Folder of the model called `name`: a variant, or ``dense``."""
        return self.model_folder if name == DENSE else f"{self.results}/{name}/model"

    def base_model(self, base: str) -> str:
        """Folder of a base's model."""
        return f"{self.results}/{base}model" if base else self.model_folder

    def text_file(self, part: str) -> list[str]:
        """``calibration.jsonl`` or ``heldout.jsonl``, as a list that is empty when nothing reads it."""
        needed = {
            "calibration": self.config["calibration"]["source"] == "text",
            "heldout": self.config["evaluation"]["perplexity"] is not None
            or not {*HELDOUT_TASKS}.isdisjoint(self.config["evaluation"]["tasks"]),
        }
        if not needed[part]:
            return []
        text = self.config["text"]
        # conversations are text by a model's template: another model's is another text
        name = f"{text['name']}--{self.config['model']['name']}" if needs_template(text) else text["name"]
        return [f"resources/text/{name}/{part}.jsonl"]

    def dense_states(self) -> list[str]:
        """What enters the head of the dense model on the held-out text, where variants are compared with it."""
        perplexity = self.config["evaluation"]["perplexity"]
        return [f"{self.results}/{DENSE}/states.h5"] if perplexity is not None and perplexity["kl"] else []

    def structure_of(self, base: str) -> str:
        """Structure of a base's model."""
        return f"{self.results}/{base}structure.json"

    def hidden_before(self, first: int, base: str = "") -> list[str]:
        """Hidden states that the chunk starting at layer `first` continues from; none for the first chunk."""
        before = [chunk for chunk in self.chunks_of(base) if chunk.stop == first]
        return [f"{self.results}/{base}hidden/layers_{chunk_name(chunk)}.h5" for chunk in before]

    def gradient_behind(self, last: int, base: str = "") -> list[str]:
        """Gradient that the chunk ending at layer `last` continues from; none for the last chunk."""
        behind = [chunk for chunk in self.chunks_of(base) if chunk.start == last + 1]
        return [f"{self.results}/{base}gradients/hidden_{chunk_name(chunk)}.h5" for chunk in behind]

    def activations_of(self, layer: int, base: str = "") -> str:
        """Activations of the chunk that layer `layer` is in."""
        return f"{self.results}/{base}activations/layers_{chunk_name(self.chunk_with(layer, base))}.h5"

    def head_of(self, variant: str) -> list[str]:
        """What errors of the head cost, where that is asked."""
        return [f"{self.results}/{self.base_of(variant)}head.h5"] if self.asks_head(variant) else []

    def drift_of(self, variant: str) -> list[str]:
        """How far blocks move the predicted token, for the methods that learn all layers in one job."""
        return [f"{self.results}/{self.base_of(variant)}drift.json"] if self.learns_model(variant) else []

    def grams_of(self, unit: str, base: str = "") -> list[str]:
        """Gram files of a unit's layers."""
        return [f"{self.results}/{base}gram/{layer_name(layer)}.h5" for layer in layers_of(unit)]

    def gradients_of(self, variant: str, unit: str) -> list[str]:
        """The file of gradients that each layer of a unit is in, for variants whose metric they are."""
        if not self.weighs_by_gradients(variant):
            return []
        base = self.base_of(variant)
        chunks = [self.chunk_with(layer, base) for layer in layers_of(unit)]
        return [f"{self.results}/{base}gradients/layers_{chunk_name(chunk)}.h5" for chunk in chunks]

    def streams_before(self, variant: str, unit: str) -> list[str]:
        """Hidden states that learning a unit in turn goes on from; none for the first unit."""
        units = self.units(variant)
        if unit not in units:
            raise CospadiError(f"{unit}: {variant} is learned in turn, in {listed(units)}")
        before = units[: units.index(unit)][-1:]
        return [f"{self.results}/{variant}/streams/{one}.h5" for one in before]

    def profiles_of(self, variant: str) -> list[str]:
        """What bytes are worth to the matrices of every unit; none where a file says what each gets."""
        if self.allocation_file(variant):
            return []
        return [f"{self.results}/{variant}/profile/{unit}.json" for unit in self.units(variant)]

    def allocation_of(self, variant: str) -> list[str]:
        """Bytes of every matrix, where they are parted; else an empty list."""
        return [f"{self.results}/{variant}/allocation.json"] if self.allocates(variant) else []

    def more_windows_of(self, variant: str, option: str) -> list[str]:
        """Windows that training by an option reads in place of the calibration's, as a list that is empty without."""
        samples = self.more_samples(variant, option)
        return [] if samples is None else [f"{self.results}/windows/{samples}.h5"]

    def distilled_of(self, variant: str) -> list[str]:
        """Folder of factors that were trained end to end, as a list that is empty for a variant whose are not."""
        return [f"{self.results}/{variant}/distilled"] if self.distills(variant) else []

    def warm_factors_of(self, variant: str, unit: str) -> list[str]:
        """Factors that learning a unit starts from: another variant's, as a list that is empty where it has none."""
        source = self.factorizing(variant).get("warm_start")
        return [f"{self.results}/{source}/factors/{unit}.safetensors"] if source else []

    def pruning_files(self, pattern: str) -> dict[str, str]:
        """`pattern` with the base filled in, for every variant that loses blocks."""
        return {name: filled(pattern, base=self.base_of(name)) for name in self.variants if self.base_of(name)}

    def source_folders(self, variant: str) -> dict[str, str]:
        """Folders of the variants that a variant chooses from."""
        return {name: self.place(f"{self.results}/{name}") for name in self.sources_of(variant)}

    def of_sources(self, pattern: str, variant: str, unit: str | None = None) -> list[str]:
        """`pattern` with ``{variant}`` and ``{unit}`` filled in, for the variants that one chooses from; all units."""
        units = self.units(variant) if unit is None else [unit]
        names = self.sources_of(variant)
        return [filled(pattern, variant=name, unit=part) for name in names for part in units]

    def of_all_units(self, pattern: str) -> list[str]:
        """`pattern` with ``{variant}`` and ``{unit}`` filled in, for every unit of every variant."""
        return [
            filled(pattern, variant=variant, unit=unit) for variant in self.variants for unit in self.units(variant)
        ]
