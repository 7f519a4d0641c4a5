"""A model cut over devices gives what it gives on one, whatever the family."""

from __future__ import annotations

import pytest

import jaxserve
from tests.marks import long
from tests.mesh.cases import CASES, FAMILIES, OPTIONS, assert_same

pytestmark = pytest.mark.usefixtures("kept_programs")
MESHES = [(1, 2), (1, 4), (1, 8), (2, 2)]
"""(dp_size, tp_size)."""
NAMES = list(CASES)


def features(mesh, family):
    """Two of CASES, so that each meets each mesh and each family."""
    pair = (MESHES.index(mesh) + list(FAMILIES).index(family)) % (len(NAMES) // 2)
    return NAMES[2 * pair : 2 * pair + 2]


def test_all_pairs_are_covered():
    met = [(mesh, family, name) for mesh in MESHES for family in FAMILIES
           for name in features(mesh, family)]  # fmt: skip
    assert {(mesh, name) for mesh, _, name in met} == {(m, n) for m in MESHES for n in NAMES}
    assert {(family, name) for _, family, name in met} == {(f, n) for f in FAMILIES for n in NAMES}


def pairs():
    """Each mesh with each family. A run without the long ones has four devices that share two KV
    heads, and both kinds of parallelism at once."""
    for mesh in MESHES:
        for family in FAMILIES:
            often = (mesh, family) in (((1, 4), "qwen2"), ((2, 2), "qwen3"))
            marks = () if often else pytest.mark.long
            yield pytest.param(mesh, family, marks=marks, id=f"dp{mesh[0]}tp{mesh[1]}-{family}")


@pytest.mark.parametrize(("mesh", "family"), list(pairs()))
def test_the_tokens_of_one_device(folder, expected, mesh, family):
    dp, tp = mesh
    with jaxserve.Engine(folder(family), dp_size=dp, tp_size=tp, **OPTIONS) as engine:
        results = [engine.generate(**CASES[name]) for name in features(mesh, family)]
        info = engine.get_server_info()
        assert info["late_compiles"] == 0 and (info["dp_size"], info["tp_size"]) == mesh
    for mine, other in zip(results, expected(family, features(mesh, family)), strict=True):
        assert_same(mine, other)


@pytest.mark.parametrize(("family", "tp"), [
    long("gemma2", 2), long("granite", 2), long("olmo3", 2), long("smollm3", 2),
    long("olmo2", 4), long("gemma3", 4),
])  # fmt: skip
def test_other_families_give_the_tokens_of_one_device(folder, expected, family, tp):
    """OLMo's norms of q and k are over all devices' heads, of which several have the same k."""
    names = ["greedy", "logprobs"]
    with jaxserve.Engine(folder(family), tp_size=tp, **OPTIONS) as engine:
        results = [engine.generate(**CASES[name]) for name in names]
        assert engine.get_server_info()["late_compiles"] == 0
    for mine, other in zip(results, expected(family, names), strict=True):
        assert_same(mine, other)
