"""Run in a process of its own, where the package cannot be imported: load packed folders with transformers alone.

``python without_package.py TASKS RESULT``: TASKS is JSON ``{"families": {name: {"packed", "dense", "saved"}}, "broken":
{name: folder}}``; what was measured is written to RESULT.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from pathlib import Path


class NoPackage:
    """Stands in for a machine where the package is not installed, whatever .pth files say."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "cospadi":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoPackage())
sys.path[:] = [path for path in sys.path if not os.path.exists(os.path.join(path, "cospadi"))]
try:
    import cospadi
except ModuleNotFoundError:
    pass
else:
    raise SystemExit(f"the package is importable from {cospadi.__file__}")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
IDS = torch.randint(3, 390, (2, 40), generator=torch.Generator().manual_seed(0))
TEXT = "The old river crosses a small village and the teacher follows every winter."


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


def tensor_bytes(folder):
    tensors = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                tensors[name] = (str(tensor.dtype), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
    return tensors


def share_dictionary(attention):
    q, k = attention.q_proj, attention.k_proj
    return q.dictionary is not None and q.dictionary is k.dictionary and q.dictionary_scales is k.dictionary_scales


def share_atoms(first, second):
    """Whether two layers mix the same atoms, alone and as a part that is added."""
    parts = [(first.mlp.down_proj, second.mlp.down_proj)]
    if hasattr(first.self_attn.q_proj, "plus"):
        parts.append((first.self_attn.q_proj.plus[0], second.self_attn.q_proj.plus[0]))
    return all(one.dictionary is not None and one.dictionary is two.dictionary for one, two in parts)


def float32_errors(packed_logits, dense):
    """Of the packed and the dense model, root mean squares against the dense model in float64."""
    single = dense(IDS).logits
    double = dense.double()(IDS).logits
    dense.float()
    errors = {"packed": packed_logits, "dense": single}
    return {name: float((logits - double).square().mean().sqrt()) for name, logits in errors.items()}


@torch.no_grad()
def check_family(packed_folder, dense_folder, saved_folder):
    packed, dense = load(packed_folder), AutoModelForCausalLM.from_pretrained(dense_folder)
    exact = packed(IDS).logits
    result = {
        "modules": sorted({type(m).__name__ for n, m in packed.named_modules() if n.endswith("_proj")}),
        "base": type(packed).__mro__[2].__name__,
        "trainable": sum(p.requires_grad for n, p in packed.named_parameters() if n.endswith(("dictionary", "values"))),
        "on_meta": sum(t.is_meta for t in packed.state_dict().values()),
        "tied_head": packed.lm_head.weight is packed.model.embed_tokens.weight,
        "shared": share_dictionary(packed.model.layers[1].self_attn),
        "shared_atoms": share_atoms(packed.model.layers[0], packed.model.layers[2]),
        "float32_error": float32_errors(exact, dense),
    }
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(packed.config, trust_remote_code=True)
    empty.to_empty(device="cpu").tie_weights()
    result["tied_again"] = share_dictionary(empty.model.layers[1].self_attn)
    errors = {}
    for name, model in (("packed", packed.to(torch.bfloat16)), ("dense", dense.to(torch.bfloat16))):
        errors[name] = float((model(IDS).logits.float() - exact).square().mean().sqrt() / exact.std())
    result["bfloat16_error"] = errors

    packed.to(torch.float32)
    generate = {"max_new_tokens": 8, "do_sample": False}
    result["generated"] = packed.generate(IDS[:1, :5], **generate).tolist()
    result["generated_dense"] = (
        AutoModelForCausalLM.from_pretrained(dense_folder).generate(IDS[:1, :5], **generate).tolist()
    )
    tokenizers = [
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True) for folder in (packed_folder, dense_folder)
    ]
    result["tokens"] = [tokenizer(TEXT)["input_ids"] for tokenizer in tokenizers]

    untouched = load(packed_folder)
    untouched.tie_weights()
    untouched.save_pretrained(saved_folder)
    result["saved_equal"] = tensor_bytes(saved_folder) == tensor_bytes(packed_folder)
    configs = [json.loads((Path(folder) / "config.json").read_text()) for folder in (packed_folder, saved_folder)]
    result["saved_config_lacks"] = [
        key
        for key in configs[0]
        if configs[0][key] != configs[1].get(key) and key not in {"dtype", "torch_dtype", "transformers_version"}
    ]
    code = {path.name: path.read_text() for path in Path(packed_folder).glob("*.py")}
    result["saved_code"] = {path.name: path.read_text() for path in Path(saved_folder).glob("*.py")} == code
    result["saved_error"] = float((load(saved_folder)(IDS).logits - exact).abs().max())
    return result


def check_loading_options(packed_folder):
    reference = load(packed_folder)
    half = load(packed_folder, dtype=torch.bfloat16)
    placed = load(packed_folder, device_map="auto")
    direct = type(reference).__mro__[1].from_pretrained(packed_folder)
    built = AutoModelForCausalLM.from_config(reference.config, trust_remote_code=True)
    x = torch.randn(1, 4, 48, requires_grad=True)
    reference(inputs_embeds=x).logits.sum().backward()
    loss = reference(IDS, labels=IDS).loss
    with torch.no_grad():
        return {
            "dtype": [str(half.dtype), str(half(IDS).logits.dtype)],
            "packed_dtypes": sorted(
                {str(half.get_parameter(n).dtype) for n in half.state_dict() if n.endswith(".values")}
            ),
            "device_map": float((placed(IDS.to(placed.device)).logits.cpu() - reference(IDS).logits).abs().max()),
            "pickled": float((pickle.loads(pickle.dumps(reference))(IDS).logits - reference(IDS).logits).abs().max()),
            "pickled_config": pickle.loads(pickle.dumps(reference.config)).to_dict() == reference.config.to_dict(),
            "direct": float((direct(IDS).logits - reference(IDS).logits).abs().max()),
            "built": sorted(built.state_dict()) == sorted(reference.state_dict()),
            "gradient": float(x.grad.abs().sum()),
            "loss": float(loss),
            "footprint": reference.get_memory_footprint(),
            "file_bytes": sum(path.stat().st_size for path in Path(packed_folder).glob("*.safetensors")),
        }


def check_evaluation(packed_folder, dense_folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def loglikelihoods(folder, **kwargs):
        model = HFLM(pretrained=str(folder), device="cpu", batch_size=1, **kwargs)
        requests = [
            Instance("loglikelihood", {}, pair, index)
            for index, pair in enumerate([("The old river", " crosses a village"), ("Every", " teacher")])
        ]
        return [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]

    return {"packed": loglikelihoods(packed_folder, trust_remote_code=True), "dense": loglikelihoods(dense_folder)}


def check_broken(folder):
    try:
        load(folder)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing raised", ""]


def main(tasks_path, result_path):
    tasks = json.loads(Path(tasks_path).read_text())
    families = tasks["families"]
    result = {"families": {name: check_family(*folders) for name, folders in families.items()}}
    packed, dense, _ = families["llama"]
    result["options"] = check_loading_options(packed)
    result["options of embeddings in few bits"] = check_loading_options(families[tasks["few bits"]][0])
    result["evaluation"] = check_evaluation(packed, dense)
    result["broken"] = {name: check_broken(folder) for name, folder in tasks["broken"].items()}
    result["refused"] = {}
    for name, loader in (
        ("auto without trust", AutoModelForCausalLM.from_pretrained),
        ("class of the base family", LlamaForCausalLM.from_pretrained),
    ):
        try:
            loader(tasks["fresh"])
        except Exception as error:
            result["refused"][name] = [type(error).__name__, str(error)]
    assert "cospadi" not in sys.modules and math.isfinite(result["options"]["loss"])
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
