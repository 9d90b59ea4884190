"""Random damage to checkpoints, codes files and configs; `fuzz` says what counts as a finding. The cases are fixed."""

from __future__ import annotations

import random

import pytest
from fuzz import CHECKS, SEEDS, Folder, damaged, fuzz, make_seeds, sanitizer


def shown(findings: list) -> str:
    return "\n".join(f"case {finding['case']}: {finding['kind']}: {finding['what']}" for finding in findings[:20])


def test_no_reader_crashes_hangs_or_disagrees(tmp_path):
    cases, findings = fuzz(tmp_path, 0, 120)
    assert cases == 120 and not findings, shown(findings)


def test_under_address_sanitizer_the_kernel_touches_nothing_outside(tmp_path):
    if sanitizer() is None:
        pytest.skip("gcc or its AddressSanitizer is not installed")
    cases, findings = fuzz(tmp_path, 500, 30, asan=True)
    assert cases == 30 and not findings, shown(findings)


def test_a_case_is_always_the_same_and_cases_differ(tmp_path):
    make_seeds(tmp_path)

    def state(case: int):
        folder, done = damaged(case, tmp_path)
        return done, repr(folder.config), repr(folder.index), folder.files, folder.text

    assert all(state(case) == state(case) for case in range(20))
    sound = [Folder(tmp_path / name) for name, *_ in SEEDS]
    changed = [
        not any((f.config, f.index, f.files, f.text) == (s.config, s.index, s.files, s.text) for s in sound)
        for f, _ in (damaged(case, tmp_path) for case in range(100))
    ]
    assert sum(changed) > 90
    kinds = {CHECKS[random.Random(-case - 1).randrange(len(CHECKS))].__name__ for case in range(100)}
    assert kinds == {"check_folder", "check_codes", "check_run_config"}
