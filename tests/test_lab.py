"""Sequences as values: against Hugging Face's logits and a model of who has which pages."""

from __future__ import annotations

import gc
import random
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import jaxserve
from jaxserve.errors import HandleLostError, OutOfPagesError
from jaxserve.lab.pages import LabPages
from tests import inside
from tests.marks import long
from tests.oracles.huggingface import Reference
from tests.prompts import ids
from tests.settled import settled

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
OPTIONS = {
    "skip_tokenizer_init": True, "dtype": "float32", "context_length": 128, "page_size": 8,
    "max_running_requests": 8, "max_total_tokens": 1024, "chunked_prefill_size": 64,
    "cuda_graph_bs": [1, 8],
}  # fmt: skip
GREEDY = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}


def text(seed, length):
    return np.random.default_rng(seed).integers(3, 500, length).tolist()


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def engine(folder):
    with settled(folder, **OPTIONS) as engine:
        yield engine


@pytest.fixture
def lab(engine):
    with engine.lab(max_tokens=512) as lab:
        yield lab
        gc.collect()
        assert lab.available_tokens == 512


@pytest.fixture(scope="module")
def reference(folder):
    """[n, V] of a sequence of n tokens."""
    known = Reference(folder)
    return lambda tokens: known.logits(tokens).numpy()


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-4, rtol=2e-4)


def test_everything_that_a_handle_can_do(lab, reference):
    prompts = [text(1, 5), text(2, 33), text(3, 90)]  # the last one in two parts
    begun = lab.prefill(prompts)
    assert [each.tokens for each in begun.handles] == prompts
    close(begun.logits, [reference(prompt)[-1] for prompt in prompts])
    stepped = lab.step(begun.handles, [7, 8, 9])
    close(stepped.logits, [reference([*p, t])[-1] for p, t in zip(prompts, (7, 8, 9), strict=True)])
    more = [[11], text(4, 20), [12, 13]]
    longer = lab.extend([stepped.handles[0], begun.handles[1], begun.handles[0]], more, at="all")
    whole = [prompts[0] + [7, 11], prompts[1] + more[1], prompts[0] + [12, 13]]
    for found, tokens, given in zip(longer.logits, whole, more, strict=True):
        close(found, reference(tokens)[-len(given) :])
    assert [each.tokens for each in longer.handles] == whole
    assert [len(each) for each in longer.hidden] == [1, 20, 2]
    cut = lab.truncate(longer.handles[1], 35)
    close(lab.step([cut], [99]).logits, [reference([*whole[1][:35], 99])[-1]])
    # what it was made of stays what it was
    again = lab.step([longer.handles[1], begun.handles[0]], [98, 97])
    close(again.logits, [reference([*whole[1], 98])[-1], reference([*prompts[0], 97])[-1]])


def test_a_greedy_loop_stays_on_the_device(engine, lab):
    """With tokens as arrays, and more handles than one program takes."""
    prompts = [text(seed, 4 + 3 * seed) for seed in range(10)]
    expected = ids(engine.generate(input_ids=prompts, sampling_params=GREEDY))
    out = lab.prefill(prompts)
    cached = [each.cached_tokens for each in out.handles]
    assert cached == [(len(prompt) - 1) // 8 * 8 for prompt in prompts]  # of whole pages
    for _ in range(20):
        out = lab.step(out.handles, jnp.argmax(out.logits, axis=-1))
    found = [each.tokens for each in out.handles]
    assert found == [p + made for p, made in zip(prompts, expected, strict=True)]


def test_branches_go_on_from_each_other(lab, reference):
    """As arrays say; across pages, and with handles of them afterwards."""
    prompt, dice = text(6, 13), np.random.default_rng(6)
    (root,) = lab.prefill([prompt]).handles
    branches, known = lab.branch(root, 3), [prompt] * 3
    for number in range(22):
        parents, tokens = dice.integers(0, 3, 3), dice.integers(3, 500, 3)
        given = (
            (tokens.tolist(), parents.tolist())
            if number % 2
            else map(jnp.asarray, (tokens, parents))
        )
        if number % 5 == 4:
            parents, given = range(3), (tokens,)
        out = branches.step(*given)
        known = [[*known[p], int(t)] for p, t in zip(parents, tokens, strict=True)]
        close(out.logits, [reference(each)[-1] for each in known])
    assert branches.length == 35 and lab.available_tokens == 512 - 16 - 4 * 3 * 8
    handles = branches.handles()
    assert [each.tokens for each in handles] == known
    branches.free()
    more = lab.step([*handles, root], [7, 8, 9, 10])
    expected = [[*each, t] for each, t in zip([*known, prompt], (7, 8, 9, 10), strict=True)]
    close(more.logits, [reference(each)[-1] for each in expected])
    pages = {page for each in [*handles, *more.handles, root] for page in each.pages}
    assert lab.available_tokens == 512 - 8 * len(pages)
    with pytest.raises(jaxserve.InvalidRequestError, match="the branches have been freed"):
        branches.step([1, 2, 3])
    for width in (0, 9):
        with pytest.raises(jaxserve.InvalidRequestError, match=r"width must be in \[1, 8\], got"):
            lab.branch(root, width)
    with pytest.raises(jaxserve.InvalidRequestError, match=r"parents must be integers \[2\], got"):
        lab.branch(root, 2).step([3, 4], [0])


@pytest.mark.parametrize("count", [25, long(400)])
def test_random_operations_while_requests_run(engine, lab, reference, count):
    """Logits are those of the tokens, and pages are had by whom they should be."""
    desk, done, found = lab._desk, threading.Event(), []
    prompts = [text(70 + seed, 30) for seed in range(2)]
    expected = ids(engine.generate(input_ids=prompts, sampling_params=GREEDY))

    def serve():
        while not done.is_set():
            found.append(ids(engine.generate(input_ids=prompts, sampling_params=GREEDY)))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        _operate(lab, desk, reference, random.Random(count), count)
    finally:
        done.set()
        thread.join(60)
    assert found and all(each == expected for each in found)


def _operate(lab, desk, reference, dice, count):
    handles = {}  # handle -> its tokens

    def some():
        return dice.sample(sorted(handles, key=lambda h: handles[h]), min(len(handles), 3))

    for _ in range(count):
        kind = dice.choice(["prefill", "step", "step", "extend", "cut", "fork", "free", "drop"])
        chosen, out, tokens = some(), None, []
        try:
            if kind == "prefill" or not chosen:
                given = [[dice.randrange(3, 500) for _ in range(dice.randint(1, 40))]]
                out, tokens = lab.prefill(given), given
            elif kind == "step":
                chosen += chosen[:1]  # the same one twice
                given = [dice.randrange(3, 500) for _ in chosen]
                out = lab.step(chosen, given)
                tokens = [[*handles[h], t] for h, t in zip(chosen, given, strict=True)]
            elif kind == "extend":
                given = [
                    [dice.randrange(3, 500) for _ in range(dice.randint(1, 12))] for _ in chosen
                ]
                out = lab.extend(chosen, given)
                tokens = [handles[h] + t for h, t in zip(chosen, given, strict=True)]
            elif kind == "cut":
                length = dice.randint(1, chosen[0].length)
                handles[lab.truncate(chosen[0], length)] = handles[chosen[0]][:length]
            elif kind == "fork":
                handles[chosen[0].fork()] = handles[chosen[0]]
            else:
                for handle in chosen:
                    del handles[handle]
                if kind == "free":
                    lab.free(chosen)
        except OutOfPagesError:
            lab.free(list(handles))
            handles.clear()
        except jaxserve.InvalidRequestError as error:
            assert "context_length" in str(error)
        if out is not None:
            close(out.logits, [reference(each)[-1] for each in tokens])
            handles |= dict(zip(out.handles, tokens, strict=True))
        handle = chosen = out = None  # nobody else has one
        counts: dict[int, int] = {}
        for handle, known in handles.items():
            assert handle.tokens == known
            assert len(set(handle.pages)) == len(handle.pages) == -(-len(known) // 8)
            for page in handle.pages:
                counts[page] = counts.get(page, 0) + 1
        assert lab._call(lambda: desk.counts) == counts
        assert lab.available_tokens == 512 - 8 * len(counts)


def test_pages_that_are_not_there(engine, lab):
    (handle,) = lab.prefill([text(1, 100)]).handles
    others = [lab.prefill([text(seed, 120)]).handles for seed in range(3)]
    before = lab.available_tokens
    with pytest.raises(OutOfPagesError, match="15 pages are wanted and 6 of the laboratory's 64"):
        lab.prefill([text(9, 120)])
    assert lab.available_tokens == before == 48
    assert lab.step([handle], [5]).handles[0].length == 101
    lab.free(others[0])
    assert lab.available_tokens == 48 + 120
    with pytest.raises(
        jaxserve.InvalidRequestError, match=r"handles\[0\], of 120 tokens, has been"
    ):
        lab.step(others[0], [3])


def test_a_failed_step_loses_handles_and_rebuild_brings_them_back(
    engine, lab, reference, monkeypatch
):
    out = lab.prefill([text(1, 30), text(2, 12)])
    out = lab.step(out.handles, jnp.argmax(out.logits, axis=-1))
    lengths = [each.length for each in out.handles]
    runner, once = inside.runner(engine), iter([True])
    queue = runner._queue

    def fails(key, executable, given):
        if key[0] == "decode" and next(once, False):
            raise RuntimeError("injected")
        return queue(key, executable, given)

    monkeypatch.setattr(runner, "_queue", fails)
    assert len(engine.generate(input_ids=text(5, 9), sampling_params=GREEDY)["output_ids"]) == 20
    for call in (lambda: lab.step(out.handles, [3, 4]), lambda: lab.fork(out.handles[0])):
        with pytest.raises(HandleLostError, match="was lost in a failed step"):
            call()
    again = lab.rebuild(out.handles)
    assert [each.length for each in again.handles] == lengths
    close(again.logits, [reference(each.tokens)[-1] for each in out.handles])


def test_what_cannot_be(engine, lab):
    (handle,) = lab.prefill([[3, 4, 5]]).handles
    with engine.lab(max_tokens=8) as other:
        (foreign,) = other.prefill([[3]]).handles
        wrong = [
            (lambda: lab.prefill([]), "prompts is empty"),
            (lambda: lab.prefill([[]]), r"prompts\[0\] is empty"),
            (lambda: lab.prefill([[3, 512]]), r"prompts\[0\] contains 512, which is outside"),
            (lambda: lab.prefill([[3] * 129]), "129 tokens is longer than context_length=128"),
            (lambda: lab.prefill([[3]], at="some"), "at must be .* got 'some'"),
            (lambda: lab.step([handle], [3, 4]), "tokens has 2 ids for 1 handles"),
            (lambda: lab.step([handle], jnp.zeros(2, int)), r"integers \[1\], got int32\[2\]"),
            (
                lambda: lab.step([3], [4]),
                r"handles\[0\] must be a handle of this laboratory, got 3",
            ),
            (lambda: lab.step([foreign], [4]), "must be a handle of this laboratory"),
            (lambda: lab.extend([handle], [[3], [4]]), "tokens has 2 lists for 1 handles"),
            (lambda: lab.truncate(handle, 4), r"length must be in \[1, 3\], got 4"),
            (lambda: engine.lab(max_tokens=0), "max_tokens must be"),
            (lambda: engine.lab(max_tokens=8, replica=1), "replica must be"),
            (lambda: engine.lab(max_tokens=900), "max_tokens=900 leaves .* may be 128 long"),
        ]
        for call, message in wrong:
            with pytest.raises(jaxserve.InvalidRequestError, match=message):
                call()
    with pytest.raises(jaxserve.InvalidRequestError, match="the laboratory is closed"):
        other.prefill([[3]])
    lab.free(handle)


def test_an_engine_that_is_gone(folder):
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        lab = engine.lab(max_tokens=64)
        out = lab.prefill([[3, 4]])
    assert np.isfinite(np.asarray(out.logits)).all()  # what was computed stays
    with pytest.raises(jaxserve.EngineShutdownError):
        lab.step(out.handles, [5])
    lab.close()
    with pytest.raises(jaxserve.EngineShutdownError):
        engine.lab(max_tokens=64)


@pytest.mark.parametrize("seed", range(4))
def test_pages_are_written_once(seed):
    """A value that grows in place never writes where another value reads."""
    dice = random.Random(seed)
    pages = LabPages(range(100, 140), 4)
    memory: dict[int, list[int | None]] = {}
    values: list[tuple[tuple[int, ...], list[int]]] = [((), [])]
    for number in range(400):
        held, tokens = dice.choice(values)
        if tokens and dice.random() < 0.3:
            length = dice.randint(1, len(tokens))
            values.append((pages.cut(held, length), tokens[:length]))
        else:
            more = [1000 * number + i for i in range(dice.randint(1, 9))]
            try:
                (growth,) = pages.grow([(held, len(tokens), len(more))])
            except OutOfPagesError:
                for gone, _ in values[1:]:
                    pages.release(gone)
                assert pages.available == 40 and not pages.counts()
                values = values[:1]
                continue
            for source, target in growth.copies:
                memory[target] = list(memory[source])
            for place, token in enumerate(more, len(tokens)):
                memory.setdefault(growth.pages[place // 4], [None] * 4)[place % 4] = token
            values.append((growth.pages, tokens + more))
        for held, tokens in values:
            read = [memory[page][i] for page in held for i in range(4)]
            assert read[: len(tokens)] == tokens
