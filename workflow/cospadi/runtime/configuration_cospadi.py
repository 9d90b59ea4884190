"""Config of a packed checkpoint: the base family's config, under its own model type.

``config.json`` holds the base model's sizes, ``base_model_type`` and ``quantization_config`` (format version, one spec
a packed matrix). The class is made when it is read: `CospadiConfig` in front of the family's own config class, so that
everything the family's model code asks of its config is there.
"""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import is_torch_available

from .cospadi_format import (
    LOAD_HINT,
    MODEL_TYPE,
    UnreadableError,
    config_faults,
    in_one_line,
    packing_faults,
    read_object,
)

if TYPE_CHECKING:
    # Nothing of this runs. transformers copies a folder's code by the lines of this form in the module that config.json
    # names; older versions do not look for more in the modules that these lines name.
    from .cospadi_bf14 import Bf14  # noqa: F401
    from .cospadi_checksums import write_checksums  # noqa: F401
    from .cospadi_codecs import decode_codes  # noqa: F401
    from .cospadi_compiler import library  # noqa: F401
    from .cospadi_cpu import kernel  # noqa: F401
    from .cospadi_cpu_source import SOURCE  # noqa: F401
    from .cospadi_cuda import gpu_kernels  # noqa: F401
    from .cospadi_cuda_kernels import row_products  # noqa: F401
    from .cospadi_diagonal import Diagonal  # noqa: F401
    from .cospadi_embedding import PackedEmbedding  # noqa: F401
    from .cospadi_entropy import Entropy  # noqa: F401
    from .cospadi_entropy_parts import parsed  # noqa: F401
    from .cospadi_entropy_source import SOURCE as CODER  # noqa: F401
    from .cospadi_entropy_streams import decoded  # noqa: F401
    from .cospadi_integers import Integers  # noqa: F401
    from .cospadi_linear import PackedLinear  # noqa: F401
    from .cospadi_mixture import Mixture  # noqa: F401
    from .cospadi_products import packed_linear  # noqa: F401
    from .cospadi_registry import CODECS  # noqa: F401
    from .cospadi_supports import Support  # noqa: F401
    from .cospadi_trellis import Trellis  # noqa: F401
    from .cospadi_values import Codec  # noqa: F401
    from .modeling_cospadi import CospadiForCausalLM  # noqa: F401


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # of transformers before configs were dataclasses; those have an `__init__` of their own
        self.packing = kwargs.pop("quantization_config", None)
        kwargs.pop("transformers_weights", None)
        super().__init__(*args, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        self.packing = kwargs.pop("quantization_config", None)
        kwargs.pop("transformers_weights", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_pretrained`.

        Raises
        ------
        OSError
            If ``config.json`` is not one JSON object.
        """
        file = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "config.json")
        if file.is_file():  # else transformers looks for it on the hub, or says that it is missing
            try:
                read_object(file)
            except UnreadableError as error:
                raise OSError(f"{pretrained_model_name_or_path}: {error}. Fetch it again") from error
        config_dict, kwargs = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return cls.from_dict(config_dict, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`.

        Raises
        ------
        ValueError
            If the format version or the base family is not known, a matrix is described wrongly, or the rest makes no
            config of the family.
        """
        if cls is not CospadiConfig:
            return super().from_dict(config_dict, **kwargs)
        source = kwargs.get("name_or_path", config_dict.get("_name_or_path", "config"))
        _refuse(config_faults(config_dict), source)
        family = family_config(config_dict.get("base_model_type"), source)
        try:
            return family.from_dict(config_dict, **kwargs)
        except Exception as error:  # each family has its own ways to stumble over a wrong value
            raise ValueError(
                f"{source}: config.json makes no config of {family.__mro__[2].__name__} "
                f"({type(error).__name__}: {error}). Fetch it again"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """As in ``config.json``."""
        config_dict = super(CospadiConfig, self._with(None)).to_dict()
        del config_dict["packing"]
        config_dict["quantization_config"] = _copied(self.packing)
        config_dict["transformers_weights"] = LOAD_HINT
        return config_dict

    def __repr__(self) -> str:
        # transformers makes this text at every loading, for its log
        short = self.packing
        if short is not None:
            short = {**short, "matrices": f"of {len(short['matrices'])} matrices"}
        return super(CospadiConfig, self._with(short)).__repr__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # as of any object, but for the specs; transformers copies a config several times when it loads a model
        made = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self.packing)] = _copied(self.packing)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _with(self, packing: Any) -> Any:
        """A shallow copy with another `packing`."""
        made = copy.copy(self)
        made.packing = packing
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle finds a class by its name, which all families share
        return _new_config, (self.base_model_type,), self.__dict__

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: the class says itself that it is saved with its code."""


def _copied(packing: Any) -> Any:
    """A deep copy: specs are thousands of small objects of JSON, which pickle copies ten times as fast as `copy`."""
    return pickle.loads(pickle.dumps(packing, pickle.HIGHEST_PROTOCOL))


def check_packing(packing: Any, source: str) -> None:
    """Refuse a ``quantization_config`` that this code would misread.

    Raises
    ------
    ValueError
        Naming the folder, the matrix, the value found and what is known.
    """
    _refuse(packing_faults(packing), source)


def _refuse(faults: list[str], source: str) -> None:
    if faults:
        raise ValueError(f"{source}: {in_one_line(faults)}. Fetch or assemble the folder again")


def family_config(base_model_type: str | None, source: str = "config") -> type[PreTrainedConfig]:
    """Config class of packed models of one family, such as ``"llama"``.

    Raises
    ------
    ValueError
        If the installed transformers has no such family.
    """
    known = isinstance(base_model_type, str) and base_model_type != MODEL_TYPE and base_model_type in CONFIG_MAPPING
    if not known:
        raise ValueError(
            f"{source}: base_model_type {base_model_type!r} is not known to the installed transformers. Upgrade it"
        )
    return _family_config(base_model_type)


@functools.cache
def _family_config(base_model_type: str) -> type[PreTrainedConfig]:
    # the name is the one in config.json's auto_map, where transformers looks it up again. Old versions make configs of
    # nothing but defaults, which are of the family, too
    of_all = {"__module__": __name__, "base_model_type": base_model_type}
    family = type("CospadiConfig", (CospadiConfig, CONFIG_MAPPING[base_model_type]), of_all)
    if is_torch_available():  # without it there are configs and tokenizers all the same
        from transformers import AutoModelForCausalLM

        # not at the top: the modelling module imports this one
        from .modeling_cospadi import CospadiForCausalLM

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
