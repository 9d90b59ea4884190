"""Causal language models loaded from a packed checkpoint: any family of transformers, its linears packed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .configuration_cospadi import CospadiConfig, check_packing, family_config, register
from .cospadi_checksums import CHECKSUMS, checksum_faults, write_checksums
from .cospadi_embedding import DECODED, PackedEmbedding, tied_head
from .cospadi_entropy import DamagedStreamError, Decoding
from .cospadi_format import (
    EMBEDDING,
    HEAD,
    Stored,
    UnreadableError,
    all_parts,
    in_one_line,
    read_headers,
    reader,
    stored_faults,
)
from .cospadi_linear import DenseLinear, Packed, PackedLinear, pack_, packed_layers, set_kernels, unpack_
from .cospadi_mixture import Mixture, packed_module
from .cospadi_products import SharedProjection
from .cospadi_registry import CODECS

if TYPE_CHECKING:
    # Nothing of this runs. transformers copies a folder's code by the lines of this form in the module that config.json
    # names; older versions do not look for more in the modules that these lines name.
    from .cospadi_bf14 import Bf14  # noqa: F401
    from .cospadi_codecs import decode_codes  # noqa: F401
    from .cospadi_compiler import library  # noqa: F401
    from .cospadi_cpu import kernel  # noqa: F401
    from .cospadi_cpu_source import SOURCE  # noqa: F401
    from .cospadi_cuda import gpu_kernels  # noqa: F401
    from .cospadi_cuda_kernels import row_products  # noqa: F401
    from .cospadi_diagonal import Diagonal  # noqa: F401
    from .cospadi_entropy_parts import parsed  # noqa: F401
    from .cospadi_entropy_source import SOURCE as CODER  # noqa: F401
    from .cospadi_entropy_streams import decoded  # noqa: F401
    from .cospadi_integers import Integers  # noqa: F401
    from .cospadi_supports import Support  # noqa: F401
    from .cospadi_trellis import Trellis  # noqa: F401
    from .cospadi_values import Codec  # noqa: F401

__all__ = ["CospadiForCausalLM", "PackedLinear", "pack_", "packed_layers", "register", "set_kernels", "unpack_"]

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

_REMEDY = "Fetch or assemble the folder again"
# Since this version transformers tells accelerate every name of a tensor on the disk, not the first one alone
_FINDS_SHARED = (5, 13)

# What entropy-coded matrices are decoded to
STREAMS = ("dense", "int8")


class _Folder(NamedTuple):
    """What is being loaded: every tensor by its name, and the streams among them that transformers need not read."""

    stored: Mapping[str, Stored]
    streams: Collection[str]


# for the model that is made
_LOADING: ContextVar[_Folder | None] = ContextVar("loading", default=None)
# what the `save_pretrained` that runs now was given
_SAVING: ContextVar[Mapping[str, Any] | None] = ContextVar("saving", default=None)


class CospadiForCausalLM:
    """Part of the model that is about packing; comes before the family's causal language model class.

    Building the model replaces the linears named in the config by `PackedLinear`. `from_pretrained` does so before any
    memory is taken, then loads as usual, and fails where an ordinary model would be given random weights.
    """

    config_class = CospadiConfig
    _auto_class = "AutoModelForCausalLM"
    shared_tensors: dict[str, str] = {}  # noqa: RUF012 (replaced, never changed)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        source = config.name_or_path or "config"
        stored, streams = _LOADING.get() or (None, ())
        if stored is None:  # else `from_pretrained` has looked at it
            check_packing(config.packing, source)
        n_layers = getattr(config, "num_hidden_layers", 0)
        if stored is not None and n_layers > len(stored):
            raise ValueError(
                f"{source}: num_hidden_layers is {n_layers} in config.json, for {len(stored)} tensors in the files. "
                f"{_REMEDY}"
            )
        try:
            # what is loaded needs no numbers first: half of the time that making a model takes
            with no_init_weights() if stored is not None else contextlib.nullcontext():
                super().__init__(config, *args, **kwargs)
        except Exception as error:  # each family has its own ways to stumble over a wrong value
            if args or kwargs:
                raise
            raise ValueError(
                f"{source}: config.json makes no model ({type(error).__name__}: {error}). {_REMEDY}"
            ) from error
        matrices = config.packing["matrices"]
        for name, spec in matrices.items():
            _replace(self, name, spec, source)
        for module in self.modules():
            if type(module) is nn.Linear:
                module.__class__ = DenseLinear
        if stored is not None:
            _check_shapes(self, stored, source)
        self.shared_tensors = {}
        if HEAD not in matrices and isinstance(self.get_input_embeddings(), PackedEmbedding):
            self._tie_head()
        for name, owner in _owners(config.packing):
            self._share_dictionary(name, owner)
        layers = packed_layers(self) if streams else {}
        for name in streams:  # `from_pretrained` sets them: transformers takes 0.2 ms for each name of a tensor
            self._set_stream(layers, name, None)
        self.all_tied_weights_keys = self._of_packed(self.all_tied_weights_keys)

    def _tie_head(self) -> None:
        """Have the head read the packed embedding, in a family and with a config that tie them."""
        if "lm_head.weight" in super().get_expanded_tied_weights_keys():
            self.lm_head = tied_head(self.get_input_embeddings())
            self.shared_tensors |= {f"{HEAD}.{part}": of for part, of in self.lm_head._tied_weights_keys.items()}

    def _set_stream(self, layers: Mapping[str, Packed], name: str, values: nn.Parameter | None) -> None:
        """Give a packed layer its stream, and the head that is tied to it the same one."""
        layers[name.removesuffix(".values")].values = values
        if self.shared_tensors.get(f"{HEAD}.values") == name:
            layers[HEAD].values = values
            self.all_tied_weights_keys = self._of_packed(self.all_tied_weights_keys)

    def _share_dictionary(self, name: str, owner_name: str) -> None:
        layer, owner = self.get_submodule(name), self.get_submodule(owner_name)
        # a mixture mixes the atoms themselves, and each layer in its own way; scaled inputs are soon made
        if not isinstance(layer, Mixture) and not layer.scales_inputs:
            if owner.projection is None:
                owner.projection = SharedProjection()
            layer.projection = owner.projection
        # tells `save_pretrained` which of the shared names to leave out
        layer._tied_weights_keys = {}
        for part in ("dictionary", "dictionary_scales"):
            if getattr(owner, part) is not None:
                setattr(layer, part, getattr(owner, part))
                layer._tied_weights_keys[part] = f"{owner_name}.{part}"
                self.shared_tensors[f"{name}.{part}"] = f"{owner_name}.{part}"

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Names tied to others: the base model's, unless they are packed, and those of shared packed tensors."""
        return self._of_packed(super().get_expanded_tied_weights_keys(all_submodels))

    def _of_packed(self, tied: Mapping[str, str]) -> dict[str, str]:
        """Without dense weights that are not there any more, and with shared packed tensors."""
        packed = {f"{name}.weight" for name in (EMBEDDING, HEAD) if name in self.config.packing["matrices"]}
        shared = {name: of for name, of in self.shared_tensors.items() if self._has(of)}
        return {name: of for name, of in tied.items() if packed.isdisjoint((name, of))} | shared

    def _has(self, name: str) -> bool:
        """Whether a packed tensor is there: a stream is not while transformers loads the rest."""
        module, _, part = name.rpartition(".")
        return getattr(self.get_submodule(module), part) is not None

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; the first of its parameters does not say so where that is packed."""
        embedding = self.get_input_embeddings()
        return embedding.computed.dtype if isinstance(embedding, PackedEmbedding) else super().dtype

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; what docs/format.md says of packed tensors is checked first.

        Parameters
        ----------
        pretrained_model_name_or_path : path-like or str
            Folder, or repository on the hub.
        verify : bool, optional
            Whether to compare every byte of the weight files with the folder's checksums too: they are read once more.
        streams : {"dense", "int8"}, optional
            What entropy-coded matrices are decoded to: rows in the dtype of the model, which multiply fastest where
            there are many inputs, or whole numbers of 8 bits under steps, half the memory of bfloat16.
        *model_args, **kwargs
            As of `PreTrainedModel.from_pretrained`.

        Raises
        ------
        OSError
            If a weight file is cut short, tensors are missing, left over, of the wrong dtype or shape, or hold what the
            format does not allow.
        ValueError
            If the config names a format version, codec or layer that is not known, or describes a matrix wrongly; if
            the device map puts a part of the layers that share a dictionary on the disk, or all of them with
            transformers before 5.13.
        """
        path = pretrained_model_name_or_path
        if not isinstance(kwargs.get("config"), PreTrainedConfig):
            hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            kwargs["config"] = CospadiConfig.from_pretrained(kwargs.get("config") or path, **hub_arguments)
        config = kwargs["config"]
        if cls is CospadiForCausalLM:
            try:
                model_class = family_model(config.base_model_type)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            return model_class.from_pretrained(path, *model_args, **kwargs)

        check_packing(config.packing, path)
        folder = _fetched(path, kwargs)
        verified, streams = kwargs.pop("verify", False), kwargs.pop("streams", STREAMS[0])
        if streams not in STREAMS:
            raise ValueError(f"streams is {streams!r}; allowed: {', '.join(STREAMS)}")
        stored = _stored(path, folder, kwargs)
        faults = checksum_faults(folder) if verified else []
        if faults:
            raise OSError(f"{path}: {in_one_line(faults)}. {_REMEDY}")
        matrices, device_map = config.packing["matrices"], kwargs.get("device_map")
        # decoded while transformers makes the model; one on several devices may have no room for all of it here
        early = {} if device_map is not None else _to_decode(matrices, streams, _asked_dtype(config, kwargs))
        _refuse(path, stored_faults(matrices, stored, besides=early))
        wants_info = kwargs.pop("output_loading_info", False)
        if isinstance(device_map, dict) and isinstance(kwargs.get("config"), CospadiConfig):
            _check_offload(path, kwargs["config"].packing, device_map)
        # mismatched sizes are reported, and refused below by name
        kwargs["ignore_mismatched_sizes"] = True
        read = reader(stored)
        decoding = Decoding(
            {name: (codec, read(name), shape, form) for name, (codec, shape, form) in early.items()},
            torch.get_num_threads(),
        )
        token = _LOADING.set(_Folder(stored, early))
        try:
            _refuse(path, decoding.faults)
            model, info = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
            _check_loaded(path, model, info)
            _check_offload(path, model.config.packing, getattr(model, "hf_device_map", {}))
            layers = packed_layers(model)
            untouched = reader(stored)  # pages of the other map are in memory, and go when all are decoded
            for name in early:
                values = torch.from_numpy(untouched(name)).to(model.device)
                model._set_stream(layers, name, nn.Parameter(values, requires_grad=False))
            for layer in layers.values():
                layer.freeze_packed()
            _refuse(path, decoding.wait())
        finally:
            _LOADING.reset(token)
            decoding.stop()
        tied = f"{HEAD}.values" in model.shared_tensors
        decoded = {name: layer for name, layer in layers.items() if layer.is_stream and not (tied and name == HEAD)}
        _keep_decoded(path, decoded, streams, model.dtype, decoding)
        if tied and EMBEDDING in decoded:
            for part in DECODED:  # once in memory
                setattr(layers[HEAD], part, getattr(layers[EMBEDDING], part))
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with new checksums of the weight files."""
        token = _SAVING.set(kwargs)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            _SAVING.reset(token)
        if kwargs.get("is_main_process", True):
            _finish(save_directory, kwargs)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # called by `push_to_hub`, and by `save_pretrained` before it returns: what goes up has its checksums with it
        _finish(working_dir, _SAVING.get() or {})
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle finds a class by its name, which all families share
        return _new_model, (self.config.base_model_type,), self.__dict__

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if cls is CospadiForCausalLM:
            return family_model(config.base_model_type)._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Nothing to do: the class says itself that it is saved with its code."""


@functools.cache
def family_model(base_model_type: str) -> type[PreTrainedModel]:
    """Class of packed models of one family, such as ``"llama"``.

    Raises
    ------
    ValueError
        If the family is not known, or has no causal language model.
    """
    config_class = family_config(base_model_type)
    base_config = CONFIG_MAPPING[base_model_type]
    if base_config not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"the family {base_model_type!r} has no causal language model in the installed transformers")
    base = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    # streams that transformers is not to read; of other names `stored_faults` knows which have no place
    ignored = [*(base._keys_to_ignore_on_load_unexpected or ()), r"\.values$"]
    more = {"config_class": config_class, "_keys_to_ignore_on_load_unexpected": ignored}
    # the name is the one in config.json's auto_map, where transformers looks it up again
    return type("CospadiForCausalLM", (CospadiForCausalLM, base), {"__module__": __name__, **more})


def _new_model(base_model_type: str) -> PreTrainedModel:
    family = family_model(base_model_type)
    return family.__new__(family)


def _replace(model: PreTrainedModel, name: str, spec: dict[str, Any], source: str) -> None:
    """Put a packed module in the place of a linear layer or an embedding."""
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        dense = parent.get_submodule(child)
    except AttributeError as error:
        family = type(model).__bases__[1].__name__
        raise ValueError(f"{source}: config.json packs {name}, which {family} does not have. Fetch it again") from error
    is_embedding = name == EMBEDDING and isinstance(dense, nn.Embedding)
    shape = list(dense.weight.shape[::-1]) if is_embedding or isinstance(dense, nn.Linear) else None
    if shape != list(spec["shape"]):
        raise ValueError(
            f"{source}: config.json packs {name} with shape {spec['shape']}, the model's linear has {shape}"
        )
    packed = (
        PackedEmbedding(spec, dense) if is_embedding else packed_module(spec, dense.bias, device=dense.weight.device)
    )
    for module in packed.modules():
        module._is_hf_initialized = True  # transformers has nothing to draw at random here
    setattr(parent, child, packed)


def _finish(folder: Any, saved_with: Mapping[str, Any]) -> None:
    """Leave in a folder that was saved to the weights that count, and their checksums."""
    # of an earlier saving to this folder, in one file or in several, transformers leaves what counts no longer
    both = [file for file in (Path(folder, name) for name in _weight_names(saved_with)) if file.exists()]
    for stale in sorted(both, key=lambda file: file.stat().st_mtime_ns)[:-1]:
        stale.unlink()
    write_checksums(folder)


def _weight_names(kwargs: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the one weight file and of the index."""
    variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
    return f"model{variant}.safetensors", f"model.safetensors.index{variant}.json"


def _fetched(path: Any, kwargs: Mapping[str, Any]) -> Path:
    """Folder of the weight files, which are fetched first where `path` names a repository."""
    if Path(path).is_dir():
        return Path(path, kwargs.get("subfolder") or "")
    hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    weights, index = _weight_names(kwargs)
    maybe = functools.partial(cached_file, path, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    found = maybe(weights)
    if found is None:
        found = cached_file(path, index, **hub_arguments)
        get_checkpoint_shard_files(path, found, **hub_arguments)
    if kwargs.get("verify"):
        maybe(CHECKSUMS)
    return Path(found).parent


def _stored(path: Any, folder: Path, kwargs: Mapping[str, Any]) -> dict[str, Stored]:
    """Headers of the weight files."""
    try:
        return read_headers(folder, *_weight_names(kwargs))
    except UnreadableError as error:
        raise error.kind(f"{path}: {error}. {_REMEDY}") from error


def _check_shapes(model: PreTrainedModel, stored: Mapping[str, Stored], source: str) -> None:
    """Before memory is taken for the tensors that are not packed; `_check_loaded` finds what is missing."""
    faults = [
        f"{name} has shape {stored[name].shape}, expected {tuple(tensor.shape)}"
        for name, tensor in model.state_dict().items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    _refuse(source, faults)


def _refuse(source: Any, faults: Sequence[str]) -> None:
    if faults:
        raise OSError(f"{source}: the weight files do not fit config.json: {in_one_line(faults)}. {_REMEDY}")


def _owners(packing: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Layers whose dictionary is another's, and that other layer."""
    for name, spec in all_parts(packing["matrices"]).items():
        owner = spec["dictionary"].get("tensor")
        if owner not in (None, f"{name}.dictionary"):
            yield name, owner.removesuffix(".dictionary")


def _check_offload(path: Any, packing: dict[str, Any], device_map: dict[str, Any]) -> None:
    """Refuse a device map that leaves what modules share on the disk for some of them only."""

    def on_disk(name: str) -> bool:
        while name and name not in device_map:
            name = name.rpartition(".")[0]
        return device_map.get(name) == "disk"

    tied = [(HEAD, EMBEDDING)] if EMBEDDING in packing["matrices"] and HEAD not in packing["matrices"] else []
    for name, owner in [*tied, *_owners(packing)]:
        what = "matrix" if name == HEAD else "dictionary"
        if on_disk(name) != on_disk(owner):
            there, elsewhere = (name, owner) if on_disk(name) else (owner, name)
            raise ValueError(
                f"{path}: the device map puts {there} on the disk and {elsewhere} elsewhere, but they share one "
                f"{what}, which accelerate then does not find. Put both on the disk, or neither: give more memory "
                "(max_memory), or a device_map that keeps the layers of a group together"
            )
        version = transformers.__version__
        if on_disk(name) and tuple(map(int, version.split(".")[:2])) < _FINDS_SHARED:
            raise ValueError(
                f"{path}: the device map puts {name} and {owner} on the disk, which share one {what}, and transformers "
                f"{version} finds that for one of them only. Take transformers {'.'.join(map(str, _FINDS_SHARED))} or "
                "newer, or give more memory (max_memory)"
            )


def _asked_dtype(config: Any, kwargs: Mapping[str, Any]) -> Any:
    """Dtype that the model will have, as far as it can be told before; the model has the last word."""
    asked = next((kwargs[name] for name in ("dtype", "torch_dtype") if kwargs.get(name) is not None), "auto")
    asked = getattr(config, "dtype", None) if asked == "auto" else asked
    return getattr(torch, asked, None) if isinstance(asked, str) else asked


def _to_decode(matrices: Mapping[str, Any], streams: str, dtype: Any) -> dict[str, tuple[Any, tuple[int, int], type]]:
    """Streams that can be decoded for a model that is not made yet: codec, shape of the codes (k, d_out), form."""
    parts = {f"{name}.values": part for name, part in all_parts(matrices).items()}
    forms = {name: _form(part, streams, dtype) for name, part in parts.items()}
    return {
        name: (CODECS[part["codes"]["codec"]], (part["dictionary"]["n_atoms"], part["shape"][1]), forms[name])
        for name, part in parts.items()
        if forms[name] is not None
    }


def _form(part: Mapping[str, Any], streams: str, dtype: Any) -> type | None:
    """What a stream is decoded to, in NumPy's words; None where there is none, or more is to be done to its numbers."""
    codes = part["codes"]
    codec = CODECS[codes["codec"]]
    if not codec.variable:
        return None
    if streams == "int8" and (not codec.scaled or codes["n_scales"] == part["shape"][1]):
        return np.int8
    if codec.scaled:
        return None
    return np.uint16 if dtype == torch.bfloat16 else np.float32 if dtype == torch.float32 else None


def _keep_decoded(path: Any, layers: Mapping[str, PackedLinear], streams: str, dtype: Any, decoding: Decoding) -> None:
    """Give entropy-coded layers what was decoded, and decode the others; each keeps its stream, to be saved."""

    def decode(name: str) -> None:
        try:
            if streams == "int8" and layers[name].has_steps_alone:
                layers[name].unpack_steps()
            else:
                layers[name].unpack(dtype)
        except DamagedStreamError as error:
            raise OSError(f"{path}: {name}.values {error}. {_REMEDY}") from error

    left = []
    for name, layer in layers.items():
        form = _form(layer.spec, streams, dtype)
        found = decoding.take(f"{name}.values", form)
        if layer.values.device.type == "meta":  # on the disk: decoded in every product
            continue
        if found is None:
            left.append(name)
        elif form is np.int8:
            layer.unpack_steps(found)
        else:
            layer.unpack(dtype, codes=found[0])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(decode, left))


def _check_loaded(path: Any, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    layers = packed_layers(model)
    faults = [f"tensor {name} is missing" for name in sorted(info["missing_keys"])]
    faults += [
        f"{name} has shape {tuple(found)}, expected {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    # a bias, where the model has none
    faults += [
        f"{name} belongs to a packed matrix but is none of its tensors"
        for name in sorted(info["unexpected_keys"])
        if name.rpartition(".")[0] in layers
    ]
    _refuse(path, faults)
