"""The linear layer of a packed checkpoint: ``y = (x D) S + bias``."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cospadi_codecs import decode_dictionary, decode_support, encode_codes, encode_dictionary, tensor_shapes
from .cospadi_compiler import CHOICES as CPU_CHOICES
from .cospadi_compiler import choose as choose_cpu
from .cospadi_cpu import MOST_TERMS, BoundMatrix, BoundSum, Kernel
from .cospadi_cuda import CHOICES as CUDA_CHOICES
from .cospadi_cuda import apply_codes, project
from .cospadi_cuda import choose as choose_cuda
from .cospadi_diagonal import is_diagonal, times, times_transposed
from .cospadi_format import IDENTITY
from .cospadi_products import (
    INPUTS,
    PARTS,
    SharedProjection,
    apply_to_many,
    bind,
    compiled_for,
    compiled_for_dense,
    dtypes_of,
    factors_of,
    is_stored,
    is_transformed,
    is_watched,
    packed_linear,
    project_many,
    refuse_onnx,
)
from .cospadi_registry import CODECS


class Packed(nn.Module):
    """A product with a weight that is kept as packed dictionary and codes.

    The packed tensors keep the dtype of the file whatever the model is cast to, so memory stays the file's and saving
    gives back the same bytes. Where a tool casts them one by one (``p.data = p.data.float()``), products take what it
    made of them, without the kernels, until the model is cast, moved or saved. A product is computed in the dtype of
    its input.

    Parameters
    ----------
    spec : dict
        One entry of ``quantization_config.matrices``.
    bias : Parameter (d_out,), optional
    device : torch.device, optional
    tensors : mapping, optional
        The packed tensors by what they are of the matrix, where they are there already; default: zeros.
    """

    spec: dict[str, Any]
    in_features: int
    out_features: int
    scales_inputs: bool
    n_atoms: int
    # filled by `unpack`, never saved
    unpacked_dictionary: nn.Parameter | None
    unpacked_codes: nn.Parameter | None
    unpacked_weight: nn.Parameter | None
    in_steps: Steps | None  # filled by `unpack_steps`, never saved
    projection: SharedProjection | None  # set where other layers have the same dictionary
    _spec_text: str
    _dtypes: tuple[torch.dtype | None, ...]
    _binding: _Binding | None
    _call: Callable[..., torch.Tensor | None] | None  # of the binding

    def __init__(
        self,
        spec: dict[str, Any],
        bias: nn.Parameter | None = None,
        device: Any = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # of `nn.Linear` only the name is taken: it would make a weight
        shapes = tensor_shapes(spec)
        if tensors is None:
            tensors = {part: torch.zeros(shape, dtype=dtype, device=device) for part, (shape, dtype) in shapes.items()}
        parameters = {part: nn.Parameter(tensor, requires_grad=False) for part, tensor in tensors.items()}
        # at once: a Module looks at each that is set for itself, which is half of the time that making one takes.
        # parameters and not buffers: transformers ties, places and offloads parameters
        self._parameters.update({part: parameters.get(part) for part in PARTS}, bias=bias)
        self.__dict__.update(
            spec=spec,
            in_features=spec["shape"][0],
            out_features=spec["shape"][1],
            scales_inputs=is_diagonal(spec),
            n_atoms=spec["dictionary"]["n_atoms"],
            **dict.fromkeys(("unpacked_dictionary", "unpacked_codes", "unpacked_weight", "in_steps", "projection")),
            _spec_text=json.dumps(spec),
            _dtypes=dtypes_of(shapes),
            _binding=None,
            _call=None,
        )

    def __call__(self, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        """As of every Module, in fewer steps where a few rows are all there is to do.

        Decoding comes here hundreds of times a token, each time with cold caches: every object costs.
        """
        y = None if more or named else self._at_once(x, False)
        return super().__call__(x, *more, **named) if y is None else y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs (..., d_in) to outputs (..., d_out), in the dtype of the input."""
        y = self._at_once(x, True)
        if y is not None:
            return y
        if self.unpacked_weight is not None:
            return F.linear(x, self.unpacked_weight, self.bias)
        terms, summands, bias = [self], self.summands(), self._parameters["bias"]
        if self.unpacked_codes is not None:
            alone = self.dictionary is None and len(summands) == 1 and _is_plain(x)
            y = _by_kernel(self, "unpacked_codes", x) if alone else None
            if y is None:
                y, bias = F.linear(self._unpacked_projection(x), self.unpacked_codes, bias), None
        elif self.in_steps is not None:
            y = self.in_steps(x if self.dictionary is None else times(x, self.factors(x.dtype)[0]))
        elif is_watched(x):
            y = self._shown(x)
        else:
            compiled = compiled_for(x, self.spec)
            terms = summands if _is_one_call(compiled, summands, x) else terms
            y = None if compiled is None else self._product(compiled, x, terms)
            if y is None:
                y, terms = packed_linear(x, *self.parts(), self._spec_text), [self]
        y = y if bias is None else y + bias
        for part in summands[len(terms) :]:
            y = y + part(x)
        return y

    def _at_once(self, x: torch.Tensor, hooks_ran: bool) -> torch.Tensor | None:
        """The output by the layer's function in C; None where there is none, or it wants something looked at first."""
        if torch.compiler.is_dynamo_compiling() or self._call is None:
            return None
        if self.scales_inputs:
            y = self._call(self._scaled(x), self.__dict__, hooks_ran)
            y = y if y is None else y.to(x.dtype)
        else:
            y = self._call(x, self.__dict__, hooks_ran)
        bias = self._parameters["bias"]
        return y if y is None or bias is None else y + bias

    @property
    def weight(self) -> torch.Tensor:
        """Shape and device of the dense weight, for adapters; every other use is an error."""
        return _AbsentWeight((self.out_features, self.in_features), self.values.device)

    @property
    def is_stream(self) -> bool:
        """Whether codes are a stream that is decoded once, when a model is loaded, and not in every product."""
        return CODECS[self.spec["codes"]["codec"]].variable

    @property
    def has_steps_alone(self) -> bool:
        """Whether a stream's numbers have no scales besides their steps, but for one a column."""
        return self.is_stream and (self.scales is None or len(self.scales) == self.out_features)

    def parts(self) -> list[nn.Parameter | None]:
        """The packed tensors in the order of `PARTS`; None for those that this matrix does not have."""
        return [self._parameters[part] for part in PARTS]

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Dictionary as of `decode_dictionary`, and transposed codes (d_out, k) with zeros, in `dtype`."""
        return factors_of(self.spec, dtype, *self.parts())

    def summands(self) -> list[Packed]:
        """The packed matrices whose outputs are added up: of most layers itself."""
        return [self]

    def dense(self) -> torch.Tensor:
        """``(D S)^T`` in float32, (d_out, d_in)."""
        dictionary, codes = self.factors(torch.float32)
        return times_transposed(codes, dictionary)

    def multiplications(self, sharers: int) -> float:
        """Of a row of x with the unpacked factors, where `sharers` layers have one dictionary and compute z once."""
        projecting = 0 if self.dictionary is None or self.scales_inputs else self.in_features * self.n_atoms / sharers
        return projecting + self.n_atoms * self.out_features

    def unpack(self, dtype: torch.dtype, *, trainable: bool = False, codes: torch.Tensor | None = None) -> None:
        """Keep both factors unpacked beside the packed ones; `unpack_` is for whole models.

        `codes` are those that the packed ones give, where they are there already.
        """
        if trainable and CODECS[self.spec["codes"]["codec"]].whole:
            raise ValueError(
                f"codes in the codec {self.spec['codes']['codec']!r} cannot be trained, since they are not stored each "
                "for itself; write the folder dense first (cospadi.checkpoint.densify)"
            )
        self.in_steps = None
        if codes is None:
            dictionary, codes = self.factors(dtype)
        else:
            dictionary = decode_dictionary(self.spec, self.dictionary, self.dictionary_scales, dtype)
            codes = codes.to(self.values.device, dtype)
        if dictionary is not None:
            self.unpacked_dictionary = nn.Parameter(dictionary.clone(), requires_grad=trainable)
        self.unpacked_codes = nn.Parameter(codes.contiguous(), requires_grad=trainable)
        if trainable and self.support is not None:
            mask = decode_support(self.spec, self.support)
            self.unpacked_codes.register_hook(lambda gradient: gradient * mask)

    def unpack_steps(self, numbers: tuple[torch.Tensor, ...] | None = None) -> None:
        """Keep the numbers of a stream in 8 bits, and its steps: exact, and half of what `unpack` takes in bfloat16.

        `numbers` are those of `Entropy.numbers`, where they are there already.
        """
        if numbers is None:
            numbers = CODECS[self.spec["codes"]["codec"]].numbers(self.values)
        self.in_steps = Steps(*(part.to(self.values.device) for part in numbers), self.scales)

    def store(self) -> None:
        """Write trained unpacked factors into the packed tensors, rounded to their codecs; scales stay as they are."""
        self._restore_dtypes()
        with torch.no_grad():
            if self.unpacked_dictionary is not None:
                self.dictionary.copy_(encode_dictionary(self.spec, self.unpacked_dictionary, self.dictionary_scales))
            codes = self.unpacked_codes
            self.values.copy_(encode_codes(self.spec, codes, self.scales, self.support, self.values))

    def pack(self) -> None:
        """Drop what `unpack` keeps; what was trained is stored."""
        if self.unpacked_codes is not None and self.unpacked_codes.requires_grad:
            self.store()
        self.unpacked_weight = None
        if not self.is_stream:  # which is decoded once
            self.unpacked_dictionary = self.unpacked_codes = None

    def freeze_packed(self) -> None:
        """Packed tensors are no leaves to train; loading makes every floating-point parameter one."""
        for packed in self._packed():
            packed.requires_grad_(False)
        self._arrange()

    def _restore_dtypes(self) -> None:
        """Give packed tensors that a tool has cast the dtype of the file again."""
        for part, dtype in zip(self.parts(), self._dtypes, strict=True):
            if part is not None and part.dtype != dtype:
                part.data = part.data.to(dtype)

    def _arrange(self) -> None:
        """Lay the dictionary out as its device reads it: by columns on a GPU, by rows elsewhere. Numbers stay."""
        if self.dictionary is not None and self.dictionary.ndim == 2:
            stored = self.dictionary.data
            stored = stored.T.contiguous().T if stored.device.type == "cuda" else stored.contiguous()
            if stored.stride() != self.dictionary.stride():
                self.dictionary.data = stored

    def extra_repr(self) -> str:
        codes = self.spec["codes"]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, n_atoms={self.n_atoms}, "
            f"n_nonzero={codes['n_nonzero']}, codec={codes['codec']}, support={codes['support']}, "
            f"bias={self.bias is not None}"
        )

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        """What a kernel takes, which knows no diagonal: `x` as it is, or scaled, in float32 at least."""
        return times(x, self._parameters["dictionary"].float()) if self.scales_inputs else x

    def _unpacked_projection(self, x: torch.Tensor) -> torch.Tensor:
        """``z = x D``; once for the layers that share ``D``, where nothing keeps count of what it is computed from."""
        dictionary = self.unpacked_dictionary
        if dictionary is None:
            return x
        if self.projection is None or torch.is_grad_enabled() or dictionary.requires_grad or is_watched(x):
            return times(x, dictionary)
        return self.projection.of(x, dictionary.data_ptr(), lambda rows: times(rows, dictionary), x)

    def _shown(self, x: torch.Tensor) -> torch.Tensor:
        """The product as torch can record or transform it."""
        refuse_onnx()
        if is_transformed(x):
            # plain operations have rules for everything, an operator of ours only a gradient
            dictionary, codes = self.factors(x.dtype)
            return F.linear(times(x, dictionary), codes)
        return packed_linear(x, *self.parts(), self._spec_text)

    def _product(self, compiled: Any, x: torch.Tensor, terms: list[Packed]) -> torch.Tensor | None:
        """These summands added up, without an operator's overhead; None where tools cast what a kernel reads."""
        if not x.is_cpu:
            return self._product_on_gpu(x)
        binding = self._binding
        if binding is None or not binding.holds(compiled, terms):
            self._binding = self._call = None
            if not all(is_stored(term.parts(), term._dtypes, x.device) for term in terms):
                return None
            binding = self._binding = _Binding(compiled, terms)
            if len(terms) == len(self.summands()):
                self._call = compiled.layer(binding.total, terms, PARTS)
        if x.numel() <= compiled.paths.few_rows * self.in_features:
            return compiled.product(binding.total, self._scaled(x)).to(x.dtype)
        rows = x.reshape(-1, self.in_features)
        zs = [term._project_many(compiled, x, rows) for term in terms]
        return apply_to_many(compiled, binding.total, zs, x.dtype).view(*x.shape[:-1], self.out_features)

    def _project_many(self, compiled: Kernel, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``z = x D`` for many rows, once for the layers that share ``D``."""
        dictionary, scales = self._parameters["dictionary"], self._parameters["dictionary_scales"]
        project = functools.partial(project_many, compiled, self.spec, dictionary, scales)
        if dictionary is None:
            return INPUTS.of(x, 0, project, rows) if compiled.paths.without_zeros else project(rows)
        return project(rows) if self.projection is None else self.projection.of(x, dictionary.data_ptr(), project, rows)

    def _product_on_gpu(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.parts()
        if not is_stored(parts, self._dtypes, x.device):
            return packed_linear(x, *parts, self._spec_text)
        rows = x.reshape(-1, self.in_features)
        from_rows = functools.partial(project, self.spec, parts)
        # dense codes take z in another order
        shared = self.projection is not None and self.support is not None
        z = self.projection.of(x, self.dictionary.data_ptr(), from_rows, rows) if shared else from_rows(rows)
        return apply_codes(self.spec, parts, z, x.dtype).view(*x.shape[:-1], self.out_features)

    def _packed(self) -> list[nn.Parameter]:
        return [part for part in self.parts() if part is not None]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Packed:
        self._restore_dtypes()
        packed = {id(part) for part in self._packed()}

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in packed or not tensor.is_floating_point():
                return fn(tensor)
            # `fn` moves and casts; integers it only moves
            return fn(tensor.view(torch.int16)).view(tensor.dtype)

        self._binding = self._call = None
        super()._apply(keep_dtype, recurse)
        self._arrange()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.unpacked_codes is not None and self.unpacked_codes.requires_grad:
            self.store()
        self._restore_dtypes()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("unpacked_dictionary", "unpacked_codes", "unpacked_weight"):
            destination.pop(prefix + name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_binding": None, "_call": None}  # addresses


class PackedLinear(Packed, nn.Linear):
    """A linear layer of a model, packed.

    Adapters take it for the `nn.Linear` it stands for; its ``weight`` has a shape and no numbers, so nothing can be
    merged into it.
    """


class _Digits(PackedLinear):
    """Whole numbers of 8 bits that `Steps` multiplies with; made from a stream, which is what is saved."""

    def _save_to_state_dict(self, *arguments: Any) -> None:
        pass


class Steps(nn.Module):
    """A product with whole numbers times a step for every input: steps go into the input, and 8 bits hold a number.

    An input whose numbers are larger is there once more for their next 8 bits, under a step 256 times as long.

    Parameters
    ----------
    digits : Tensor (d_out, k + n), int8
    rows : Tensor (n,)
        Inputs that are there once more.
    steps : Tensor (k + n,), float32
    scales : Tensor (d_out,), bfloat16, optional
        Of the columns; default: 1.
    """

    def __init__(
        self, digits: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor, scales: torch.Tensor | None
    ) -> None:
        super().__init__()
        all_rows = torch.cat([torch.arange(len(steps) - len(rows), device=rows.device), rows]) if len(rows) else None
        # as whole numbers, which casting leaves as they are
        self.register_buffer("bits_of_steps", steps.view(torch.int32), persistent=False)
        self.register_buffer("rows", all_rows, persistent=False)
        d_out, k = digits.shape
        scales = torch.ones(d_out, dtype=torch.bfloat16, device=digits.device) if scales is None else scales.detach()
        self.digits = _Digits(
            {
                "shape": [k, d_out],
                "dictionary": {"codec": IDENTITY, "n_atoms": k},
                "codes": {
                    **{"codec": "int8", "support": "dense", "n_nonzero": k * d_out},
                    **{"group_size": None, "n_scales": d_out},
                },
            },
            tensors={"values": digits, "scales": scales},
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs (..., k) to outputs (..., d_out), computed in float32."""
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        z = (z if self.rows is None else z[..., self.rows]) * self.bits_of_steps.view(torch.float32)
        return self.digits(z).to(x.dtype)

    def columns(self, chosen: torch.Tensor) -> torch.Tensor:
        """Columns of the matrix by their numbers (n,), each as a row of the inputs: float32 (n, d_in)."""
        found = self.digits.values.view(self.digits.out_features, -1).index_select(0, chosen).float()
        found *= self.bits_of_steps.view(torch.float32)
        if self.rows is not None:
            d_in = int(self.rows.max()) + 1
            found = found.new_zeros(len(chosen), d_in).index_add_(1, self.rows, found)
        return found * self.digits.scales.index_select(0, chosen).float()[:, None]


class DenseLinear(nn.Linear):
    """A linear layer of a packed model that is not packed, such as the head.

    Where the kernel multiplies bfloat16 faster than torch does, it computes a few rows; all else is `nn.Linear`'s.
    """

    _call: Callable[..., torch.Tensor | None] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs (..., d_in) to outputs (..., d_out)."""
        if _is_plain(x) and self.bias is None:
            y = None if self._call is None else self._call(x, self.__dict__, True)
            y = _by_kernel(self, "weight", x) if y is None else y
            if y is not None:
                return y
        return F.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DenseLinear:
        self._call = None  # it keeps the weight as it was
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_call": None}  # addresses


def _is_plain(x: torch.Tensor) -> bool:
    """Whether a dense product of `x` may be the kernel's."""
    usual = torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    return not usual and x.dtype == torch.bfloat16


def _by_kernel(module: DenseLinear | Packed, name: str, x: torch.Tensor) -> torch.Tensor | None:
    """The kernel's product with a dense parameter (d_out, d_in) as it is now, without a bias; None: torch computes it.

    The module keeps the call for the next time.
    """
    weight = module._parameters[name]
    compiled = compiled_for_dense(x, weight) if type(weight) is nn.Parameter and weight.ndim == 2 else None
    if compiled is None:
        return None
    d_out, d_in = weight.shape
    spec = {
        "shape": [d_in, d_out],
        "dictionary": {"codec": IDENTITY, "n_atoms": d_in},
        "codes": {"codec": "bf16", "support": "dense", "n_nonzero": d_in * d_out},
    }
    total = BoundSum([BoundMatrix(compiled, spec, {"values": weight.detach()})])
    module._call = compiled.layer(total, [module], (name,), compiled.dense_rows)
    return None if module._call is None else module._call(x, module.__dict__, True)


class _AbsentWeight(torch.Tensor):
    """Stands where a dense weight would be: what an adapter merged into it would be lost in silence."""

    _ALLOWED = frozenset(
        {
            *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
            *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.is_floating_point, torch.Tensor.is_complex),
        }
    )

    @staticmethod
    def __new__(cls, shape: tuple[int, int], device: torch.device) -> _AbsentWeight:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in cls._ALLOWED:
            return super().__torch_function__(func, types, args, kwargs or {})
        return cls.__torch_dispatch__(func, types)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(
            "a packed linear has no dense weight, only its shape: nothing can be merged into it; "
            "write the folder dense first (cospadi.checkpoint.densify)"
        )


class _Binding:
    """The kernel's view of a layer's tensors, as long as they are the same and unchanged."""

    def __init__(self, compiled: Kernel, modules: list[Packed]) -> None:
        self._compiled = compiled
        self._seen = [(module._parameters, dict(module._parameters)) for module in modules]
        parts = [part for module in modules for part in module._packed()]
        self._states = [(part, *self._state(part)) for part in parts]
        # changes of tensors of inference mode are not counted: nothing is kept of what was computed from them
        counted = not any(part.is_inference() for part in parts)
        kept = [
            module.projection.of_few(compiled) if counted and module.projection is not None else None
            for module in modules
        ]
        self.total = BoundSum([bind(compiled, module.spec, module.parts()) for module in modules], kept)

    @staticmethod
    def _state(part: torch.Tensor) -> tuple[Any, ...]:
        return part.data_ptr(), part.dtype, None if part.is_inference() else part._version

    def holds(self, compiled: Kernel, modules: list[Packed]) -> bool:
        if self._compiled is not compiled or len(modules) != len(self._seen):
            return False
        for module, (owner, before) in zip(modules, self._seen, strict=True):
            if module._parameters is not owner or len(owner) != len(before):
                return False
            if any(owner.get(name, self) is not part for name, part in before.items()):
                return False
        return all(self._state(part) == tuple(state) for part, *state in self._states)


def _is_one_call(compiled: Any, summands: list[Packed], x: torch.Tensor) -> bool:
    """Whether the kernel adds these up in one call, and nobody wants to see what each gives."""
    return (
        x.is_cpu
        and compiled is not None
        and 1 < len(summands) <= MOST_TERMS
        and all(compiled_for(x, part.spec) is compiled and part.unpacked_codes is None for part in summands)
        and not any(part.scales_inputs for part in summands)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in summands[1:])
    )


def unpack_(model: nn.Module, dtype: torch.dtype | None = None, *, trainable: bool = False) -> nn.Module:
    """Unpack every packed layer of `model` in place; undone by `pack_`.

    Both factors are kept, or in their place the product of them where that multiplies less: in float32 and float64
    alone, where it is the same up to the rounding of the sums, and not to train them.

    Parameters
    ----------
    model : Module
    dtype : torch.dtype, optional
        Dtype the model computes in; default: that of its first floating-point parameter which is not packed.
    trainable : bool
        Whether the unpacked factors are parameters to train, the zeros of the codes staying zero. `pack_` and
        ``save_pretrained`` round what was trained to the codecs of the file.
    """
    if dtype is None:
        dense = (module for module in model.modules() if not isinstance(module, Packed))
        own = (parameter for module in dense for parameter in module.parameters(recurse=False))
        dtype = next(parameter.dtype for parameter in own if parameter.is_floating_point())
    layers = [layer for layer in packed_layers(model).values() if isinstance(layer, PackedLinear)]
    sharers = Counter(part.dictionary for layer in layers for part in layer.summands())
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for layer in layers:
        parts = layer.summands()
        factored = sum(part.multiplications(sharers[part.dictionary]) for part in parts)
        exact = dtype in (torch.float32, torch.float64) and not trainable
        if exact and layer.in_features * layer.out_features <= factored:
            layer.unpacked_weight = nn.Parameter(sum(part.dense() for part in parts).to(dtype), requires_grad=False)
            continue
        for part in parts:
            part.unpack(dtype, trainable=trainable)
            if part.dictionary is not None:
                part.unpacked_dictionary = shared.setdefault(part.dictionary, part.unpacked_dictionary)
    return model


def set_kernels(*, cpu: str | None = None, cuda: str | None = None) -> None:
    """Choose the code that computes packed products, for all models of this process, from their next product on.

    Models, also compiled ones, stay as they are: the choice is looked up at every product. Numbers differ by rounding.

    Parameters
    ----------
    cpu : str, optional
        ``"auto"``, at the start: the best compiled code for this processor (AVX-512 with VBMI, AVX2, or plain C).
        ``"avx2"``, ``"generic"``: compiled code of that kind, the latter plain C. ``"torch"``: plain torch operations.
        None leaves what was chosen.
    cuda : str, optional
        ``"auto"``, at the start: Triton kernels. ``"torch"``: plain torch operations. None leaves what was chosen.

    Raises
    ------
    ValueError
        If there is no such code, or this processor cannot run it; then nothing was chosen.
    """
    for device, choice, allowed in (("cpu", cpu, CPU_CHOICES), ("cuda", cuda, CUDA_CHOICES)):
        if choice is not None and choice not in allowed:
            raise ValueError(f"{device} is {choice!r}; allowed: {', '.join(allowed)}")
    if cpu is not None:
        choose_cpu(cpu)
    if cuda is not None:
        choose_cuda(cuda)


def pack_(model: nn.Module) -> nn.Module:
    """Drop the unpacked factors that `unpack_` left in `model`, after storing what was trained."""
    for layer in packed_layers(model).values():
        layer.pack()
    return model


def packed_layers(model: nn.Module) -> dict[str, Packed]:
    """Name and module of every packed layer of `model`, parts of sums included."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Packed) and not isinstance(module, _Digits)
    }
