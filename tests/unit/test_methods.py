"""Methods: what each says about a model when a run is planned, and what planning and learning agree on."""

import pytest

from cospadi.budget import nbytes_left
from cospadi.config import check_config
from cospadi.errors import ConfigError
from cospadi.formats.values import storage_of
from cospadi.methods import METHODS, planning_faults
from cospadi.methods.base import planned_problems
from cospadi.plan import Plan

MATRICES = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 5,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def settings(**changes):
    method = METHODS[changes.get("method", "cospadi")]
    return {"ratio": 0.2, "codes": {}, "targets": None, **method.defaults(), "method": method.name, **changes}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rho": 3.0}, "rho: 3.0 at ratio 0.2 is 598 atoms for gate_proj (576x1536); at most 576 can be orthonormal"),
        ({"codes": {"value_bits": 8}, "rho": 3.0}, "atoms for up_proj (576x1536); at most 576 can be orthonormal"),
        ({"ratio": 0.5, "codes": {"dictionary_bits": 4}}, "atoms for down_proj (1536x576); at most 576"),
    ],
)
def test_more_orthonormal_atoms_than_there_can_be_are_found_when_planning(changes, expected):
    for chosen in ({"method": "compot"}, {"solver": "procrustes"}):
        faults = list(planning_faults(settings(**chosen, **changes), MATRICES, 5))
        assert any(expected in fault for fault in faults), faults
    if "dictionary_bits" not in changes.get("codes", {}):
        assert not list(planning_faults(settings(**changes), MATRICES, 5)), "any number is fine for htp"


def test_the_last_group_of_layers_is_checked_too():
    # two layers side by side may have 1152 orthonormal atoms, a layer alone 576
    options = {"method": "compot", "ratio": 0.5, "group_size": 2, "share": ["down_proj"], "targets": ["down_proj"]}
    chosen = settings(**options, codes={"dictionary_bits": 4})
    assert not list(planning_faults(chosen, MATRICES, 4))
    (fault,) = planning_faults(chosen, MATRICES, 5)
    assert "for down_proj (1536x576); at most 576 can be orthonormal" in fault


def test_a_plan_refuses_what_a_method_cannot_do_and_names_the_place():
    config = {
        "run": "r",
        "model": {"name": "m", "source": "hub", "repo": "owner/m"},
        "calibration": {"source": "self"},
        "evaluation": {"perplexity": None},
        "variants": {
            "a": {"method": "compot", "ratio": 0.2, "rho": 3.0},
            "b": {"steps": [{"method": "uidl", "blocks": 1}, {"method": "compot", "ratio": 0.2, "rho": 3.0}]},
        },
    }
    with pytest.raises(ConfigError) as caught:
        Plan(check_config(config), MODEL)
    assert [fault.split(":")[0] for fault in caught.value.faults][:2] == ["variants.a.rho"] * 2
    assert any(fault.startswith("variants.b.steps.1.rho") for fault in caught.value.faults)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_plans_its_work_with_every_storage(name):
    method = METHODS[name]
    for codes in ({}, {"value_bits": 4, "dictionary_bits": 4, "block_size": None}):
        chosen = settings(method=name, ratio=0.4, codes=codes)
        for problem in planned_problems(chosen, method, MATRICES, 2):
            shapes = [target.shape for target in problem]
            options = method.complete(chosen)
            one, half = (
                method.work(problem, nbytes_left(shapes, ratio), options, storage_of(codes)) for ratio in (0.4, 0.7)
            )
            assert one.memory > 8 * max(d_in for d_in, _ in shapes) ** 2
            assert 0 < half.core.seconds() <= one.core.seconds() and one.gpu.seconds() < one.core.seconds()
