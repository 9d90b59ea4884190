"""Allocation: bytes go where they lower the error most."""

import itertools

import numpy as np
import pytest

from cospadi.allocation import Point, Points, choose
from cospadi.errors import ConfigError


def menus_of(seed, n_menus=4, n_points=6):
    rng = np.random.default_rng(seed)
    menus = {}
    for number in range(n_menus):
        nbytes = np.sort(rng.choice(np.arange(1, 60), n_points, replace=False))
        errors = np.sort(rng.random(n_points))[::-1]
        menus[f"m{number}"] = [Point(int(b), float(e), "any") for b, e in zip(nbytes, errors, strict=True)]
    return menus


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_fits_and_is_close_to_the_best_of_all(seed):
    lists = menus_of(seed)
    least = sum(points[0].nbytes for points in lists.values())
    most = sum(points[-1].nbytes for points in lists.values())
    for nbytes in np.linspace(least, most, 7).astype(int):
        chosen = choose({key: Points(points) for key, points in lists.items()}, int(nbytes))
        assert sum(point.nbytes for point in chosen.values()) <= nbytes
        found = sum(point.error for point in chosen.values())
        fitting = [c for c in itertools.product(*lists.values()) if sum(p.nbytes for p in c) <= nbytes]
        best = min(sum(point.error for point in c) for c in fitting)
        # the hull's optimum is at most one point of one menu away from the best of all
        widest = max(points[0].error - points[-1].error for points in lists.values())
        assert best - 1e-12 <= found <= best + widest
        # and nothing that still fits is left over
        left = nbytes - sum(point.nbytes for point in chosen.values())
        for key, points in lists.items():
            assert not any(p.error < chosen[key].error and 0 < p.nbytes - chosen[key].nbytes <= left for p in points)


def test_on_a_hull_with_room_for_all_steps_the_choice_is_the_best():
    # every byte of a buys 3, then 2; of b 2.5, then 1
    a = [Point(1, 5.0), Point(2, 2.0), Point(3, 0.0)]
    b = [Point(1, 3.5), Point(2, 1.0), Point(3, 0.0)]
    for nbytes, expected in ((2, (1, 1)), (3, (2, 1)), (4, (2, 2)), (5, (3, 2)), (6, (3, 3)), (9, (3, 3))):
        chosen = choose({"a": Points(a), "b": Points(b)}, nbytes, highest=10.0)
        assert (chosen["a"].nbytes, chosen["b"].nbytes) == expected


def test_errors_on_a_large_scale_need_a_high_price():
    points = Points([Point(1, 5e9), Point(10, 0.0)])
    assert choose({"a": points}, 9, highest=5e9)["a"].nbytes == 1


def test_too_few_bytes_say_what_is_the_least():
    with pytest.raises(ConfigError, match="3 bytes are left of the matrices; 5 is the least"):
        choose({"a": Points([Point(5, 1.0), Point(7, 0.5)])}, 3)
