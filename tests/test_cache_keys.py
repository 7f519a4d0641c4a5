"""What caches know tokens by: keys that are not the ids, and namespaces, in the tree, host memory
and in forks."""

from __future__ import annotations

import pytest

from jaxserve.cache.keys import namespace_of
from tests.test_scheduler import Machine, expected_tokens, make_request

PAGE = 8
PROMPT = list(range(100, 140))
PICTURE = [*PROMPT[:10], *range(-1000, -980), *PROMPT[30:]]
"""Keys where something else than their ids stands in the places of tokens 10 to 29: the first page
is the same."""
OTHER = [*PROMPT[:10], *range(5000, 5020), *PROMPT[30:]]


def run(machine, rid, prompt=PROMPT, **fields):
    request = make_request(rid, prompt, 3, **fields)
    machine.scheduler.add(request)
    machine.run_dry()
    assert request.output_ids == expected_tokens(request)
    return request


def test_equal_ids_of_different_keys_share_no_page():
    machine = Machine(60, PAGE, 4, 64, 1)
    run(machine, "text")
    assert [run(machine, f"{i}", prompt_keys=PICTURE).cached_tokens for i in range(2)] == [8, 32]
    assert [run(machine, f"{i}", prompt_keys=OTHER).cached_tokens for i in range(2)] == [8, 32]
    assert run(machine, "again").cached_tokens == 32


def test_equal_keys_in_one_batch_are_shared_and_others_not():
    """Of three prompts of the same ids in one step."""
    machine = Machine(60, PAGE, 4, 200, 1)
    keys = [PICTURE, OTHER, PICTURE]
    requests = [make_request(f"{i}", PROMPT, 3, prompt_keys=k) for i, k in enumerate(keys)]
    for request in requests:
        machine.scheduler.add(request)
    batch = machine.step()
    first, other, same = (row.sequence.pages for row in batch.rows)
    assert first[:4] == same[:4] and first[:1] == other[:1]
    assert not set(first[1:]) & set(other[1:])
    machine.run_dry()
    assert [r.output_ids for r in requests] == [expected_tokens(r) for r in requests]


def test_outputs_are_known_by_their_ids():
    """Behind a prompt whatever it is known by."""
    machine = Machine(60, PAGE, 4, 64, 1)
    first = make_request("r", PROMPT, 20, prompt_keys=PICTURE)
    machine.scheduler.add(first)
    machine.run_dry()
    longer = PROMPT + first.output_ids + [7]
    keys = PICTURE + first.output_ids + [7]
    # 60 tokens, the last of which has no KV
    assert run(machine, "r", longer, prompt_keys=keys).cached_tokens == 56
    assert run(machine, "r", longer).cached_tokens == 8


def test_samples_share_their_leaders_keys():
    machine = Machine(60, PAGE, 4, 64, 1)
    samples = [
        make_request("r", PROMPT, 3, sample, "group", prompt_keys=PICTURE) for sample in range(2)
    ]
    for request in samples:
        machine.scheduler.add(request)
    batch = machine.step()
    assert [row.leader for row in batch.rows] == [-1, 0]
    machine.run_dry()
    assert run(machine, "text").cached_tokens == 8
    assert run(machine, "picture", prompt_keys=PICTURE).cached_tokens == 32


SPACES = [
    "", namespace_of(salt="x"), namespace_of(salt="x", adapter="a"), namespace_of(adapter="x"),
]  # fmt: skip


def test_each_part_of_a_namespace_separates():
    machine = Machine(60, PAGE, 4, 64, 1)
    for expected in (0, 32):
        found = [run(machine, "r", namespace=name).cached_tokens for name in SPACES]
        assert found == [expected] * 4


def test_namespaces_of_different_parts_are_different():
    names = [
        *SPACES, namespace_of(salt="xadapter=1:a;"), namespace_of(salt="x;adapter=1:a"),
        namespace_of(salt="adapter=1:x;"), namespace_of(saltx="x"), namespace_of(salt="3:x"),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert namespace_of(salt="x", adapter="a") == namespace_of(adapter="a", salt="x")
    assert namespace_of(salt="", adapter="") == namespace_of() == ""


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ({"prompt_keys": PICTURE}, {"prompt_keys": OTHER}),
        ({"prompt_keys": PICTURE}, {}),
        ({"namespace": SPACES[2]}, {"namespace": SPACES[1]}),
    ],
)
def test_host_memory_tells_them_apart_too(mine, others):
    """The pool is too small for both: what is found comes from host memory."""
    machine = Machine(8, PAGE, 1, 64, 1, host=(20, 2))
    shared = 8 if "prompt_keys" in mine else 0
    run(machine, "r", **mine)
    run(machine, "filler", list(range(300, 360)))  # evicts all of it
    other = run(machine, "r", **others)
    assert (other.cached_tokens, other.cached_host_tokens) == (shared, shared)
    run(machine, "filler", list(range(400, 460)))
    again = run(machine, "r", **mine)
    assert (again.cached_tokens, again.cached_host_tokens) == (32, 32)
