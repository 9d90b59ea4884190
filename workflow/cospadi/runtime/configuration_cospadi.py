"""Config of a packed checkpoint: the base family's config, under its own model type.

``config.json`` holds the base model's sizes, ``base_model_type`` and ``quantization_config`` (format version, one spec
a packed matrix). The class is made when it is read: `CospadiConfig` in front of the family's own config class, so that
everything the family's model code asks of its config is there.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .cospadi_format import FORMAT_VERSION, LOAD_HINT, MODEL_TYPE


class CospadiConfig:
    """Part of the config that is about packing; comes before the family's config class.

    Attributes
    ----------
    base_model_type : str
        Model type of the dense model, such as ``"llama"``.
    packing : dict
        ``quantization_config`` of the file. Under another name here, because the model needs none of what transformers
        does for quantized ones: it is cast, moved, trained through and saved like any other.
    """

    model_type = MODEL_TYPE
    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        self.packing = kwargs.pop("quantization_config", None)
        kwargs.pop("transformers_weights", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_pretrained`."""
        config_dict, kwargs = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return cls.from_dict(config_dict, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`.

        Raises
        ------
        ValueError
            If the format version or the base family is not known.
        """
        if cls is not CospadiConfig:
            return super().from_dict(config_dict, **kwargs)
        source = kwargs.get("name_or_path", config_dict.get("_name_or_path", "config"))
        check_packing(config_dict.get("quantization_config"), source)
        return family_config(config_dict.get("base_model_type"), source).from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in ``config.json``."""
        config_dict = super().to_dict()
        config_dict["quantization_config"] = config_dict.pop("packing")
        config_dict["transformers_weights"] = LOAD_HINT
        return config_dict

    def __repr__(self) -> str:
        # transformers makes this text at every loading, for its log
        short = copy.copy(self)
        if self.packing is not None:
            short.packing = {**self.packing, "matrices": f"of {len(self.packing['matrices'])} matrices"}
        return super(CospadiConfig, short).__repr__()

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle finds a class by its name, which all families share
        return _new_config, (self.base_model_type,), self.__dict__

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: the class says itself that it is saved with its code."""


def check_packing(packing: dict[str, Any] | None, source: str) -> None:
    """Refuse a ``quantization_config`` that this code would misread.

    Raises
    ------
    ValueError
        Naming the folder, the value found and the one known.
    """
    if not isinstance(packing, dict) or packing.get("quant_method") != MODEL_TYPE or "matrices" not in packing:
        raise ValueError(f"{source}: config.json has no quantization_config of a packed checkpoint. Fetch it again")
    if packing.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{source}: format_version {packing.get('format_version')!r} is not known; this code reads "
            f"{FORMAT_VERSION}. Load it with the code that came with it (trust_remote_code=True, without importing "
            "cospadi), or install a newer cospadi"
        )


def family_config(base_model_type: str | None, source: str = "config") -> type[PreTrainedConfig]:
    """Config class of packed models of one family, such as ``"llama"``.

    Raises
    ------
    ValueError
        If the installed transformers has no such family.
    """
    if base_model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{source}: base_model_type {base_model_type!r} is not known to the installed transformers. Upgrade it"
        )
    return _family_config(base_model_type)


@functools.cache
def _family_config(base_model_type: str) -> type[PreTrainedConfig]:
    from transformers import AutoModelForCausalLM

    # not at the top: the modelling module imports this one, and reading a config needs no model code
    from .modeling_cospadi import CospadiForCausalLM

    # the name is the one in config.json's auto_map, where transformers looks it up again
    family = type("CospadiConfig", (CospadiConfig, CONFIG_MAPPING[base_model_type]), {"__module__": __name__})
    AutoModelForCausalLM.register(family, CospadiForCausalLM, exist_ok=True)
    return family


def _new_config(base_model_type: str) -> PreTrainedConfig:
    family = family_config(base_model_type)
    return family.__new__(family)


def register() -> None:
    """Let the auto classes of transformers load packed checkpoints without ``trust_remote_code``.

    May be called again, and beside the code of a checkpoint.
    """
    AutoConfig.register(MODEL_TYPE, CospadiConfig, exist_ok=True)
