"""Choosing among finished variants."""

from __future__ import annotations

import math

import numpy as np

from cospadi.allocation import AS_IS, Point
from cospadi.choosing import EVALUATIONS, Target, _smallest


def test_the_fewest_bytes_within_a_target_are_met_where_the_prediction_is_off_by_a_factor():
    draw = np.random.default_rng(0)
    menus = {}
    for group in range(60):
        sizes = np.sort(draw.integers(1000, 9000, 4))
        cost = draw.uniform(0.01, 0.04)
        points = {f"v{n}": Point(int(size), cost * 2.0 ** (-size / 1500), f"v{n}") for n, size in enumerate(sizes)}
        menus[f"m{group}",] = {**points, AS_IS: Point(10_000, 0.0, AS_IS)}

    def true_rise(chosen):
        rise = sum(menus[name,][variant or AS_IS].error for name, variant in chosen.items())
        return 1.7 * rise**1.1

    found = []

    def measure(chosen):
        found.append(math.exp(true_rise(chosen)))
        return found[-1]

    for increase in (1.05, 1.2, 1.5):
        found.clear()
        best = _smallest(menus, ["v0", "v1", "v2", "v3"], Target(increase, measure), lambda line: None)
        reached = true_rise({name: None if p.method == AS_IS else p.method for (name,), p in best.items()})
        assert len(found) == EVALUATIONS
        assert 0.98 * math.log(increase) < reached <= math.log(increase)

    # where the smallest parts of all keep to it nothing is left to search
    found.clear()
    best = _smallest(menus, ["v0", "v1", "v2", "v3"], Target(1e6, measure), lambda line: None)
    assert {point.method for point in best.values()} == {"v0"} and len(found) < EVALUATIONS
