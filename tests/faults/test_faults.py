"""Each fault of the short run as a test of its own; each broken variant must go wrong."""

import pytest

from tests.faults.frame import inject, is_bad, is_silent, run
from tests.faults.groups import GROUPS

FAULTS = [(group, fault) for group in GROUPS for fault in group.faults if not fault.long]
VARIANTS = [(group, name) for group in GROUPS if not group.thorough for name in group.variants]


@pytest.mark.parametrize("group, fault", FAULTS, ids=[f"{g.name}: {f.name}" for g, f in FAULTS])
def test_fault(tmp_path, group, fault):
    bad = [o for o in inject(fault, group.subject, tmp_path) if is_bad(fault, o)]
    assert not bad, "\n".join(f"{outcome.kind}: {outcome.detail}" for outcome in bad)


@pytest.mark.parametrize("group, name", VARIANTS, ids=[f"{g.name}: {n}" for g, n in VARIANTS])
def test_broken_variant_is_noticed(group, name):
    results = run(group, group.variants[name], long=False, every=group.every)
    assert any(is_silent(outcome) for _, outcome in results)  # and goes no further


def test_fault_names_are_unique():
    names = [(group.name, fault.name) for group, fault in FAULTS]
    assert len(set(names)) == len(names)
