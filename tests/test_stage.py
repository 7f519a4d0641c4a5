"""Which pictures are on the device, step by step, and how they are packed for their tower."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxserve.config.media import _ladder
from jaxserve.media.picture import Picture, PromptMedia, Shape
from jaxserve.packing.media import Encoding, pack_runs
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Slots
from jaxserve.scheduler.stage import Stage
from tests.test_scheduler import make_request

SLOTS = Slots(4)


def picture(name, tokens, patches=None, dtype=np.uint8):
    """One of 4 patches a token, or of `patches`."""
    count = 4 * tokens if patches is None else patches
    content = np.zeros((count, 3), dtype)
    return Picture(tokens, name.encode(), Shape(1, 1, count), content)


def showing(*parts, blocks=False):
    """A sequence whose prompt is texts, by their lengths, and pictures."""
    owners, offsets, reach, pictures = [], [], [], []
    for part in parts:
        is_text = isinstance(part, int)
        tokens = part if is_text else part.tokens
        reach += (
            range(len(reach), len(reach) + tokens)
            if is_text
            else [len(reach) + tokens - 1] * tokens
        )
        owners += [-1 if is_text else len(pictures)] * tokens
        offsets += [0] * tokens if is_text else range(tokens)
        pictures += [] if is_text else [part]
    arrays = [np.array(x, np.int32) for x in (owners, offsets, owners)]
    seen = np.array(reach, np.int32) if blocks else None
    media = PromptMedia(tuple(pictures), *arrays, reach=seen)
    return Sequence(make_request("r", [5] * len(owners), 1, media=media), 0, SLOTS)


def step(stage, *runs, patches=np.inf, most=1000):
    """A step of tokens start..stop-1 of sequences: how far each runs, and the names of the pictures
    that are put on the device before it."""
    stage.begin_step()
    stops = []
    for sequence, start, stop in runs:
        stops.append(stage.cover(sequence, start, stop, most, patches))
        stage.ran(sequence, stops[-1])
    return stops, [encoding.picture.digest.decode() for encoding in stage.take()]


A, B, C, D = (picture(name, 4) for name in "abcd")


def test_tokens_are_told_the_rows_of_their_picture():
    stage, sequence = Stage(16), showing(2, A, 1, B, 3)
    stage.begin_step()
    assert stage.cover(sequence, 0, 14, 1000) == 14
    first, second = stage.take()
    assert (first.picture, second.picture) == (A, B)
    expected = [-1, -1, *first.rows, -1, *second.rows, -1, -1, -1]
    assert sequence.media_rows.tolist() == expected
    assert len({*first.rows, *second.rows}) == 8 and max(expected) < 16


def test_a_prompt_runs_up_to_the_picture_that_finds_no_room():
    stage, sequence = Stage(8), showing(2, A, B, 1, C, 3)
    assert step(stage, (sequence, 0, 18)) == ([11], ["a", "b"])
    assert stage.blocked
    assert step(stage, (sequence, 11, 18)) == ([18], ["c"])
    assert not stage.blocked


def test_rows_are_kept_until_the_step_that_reads_them_last_is_queued():
    """Within the step that passes a picture, and while half of it is to come, nobody gets its rows:
    all pictures of a step are put there before its first token runs."""
    stage, first, second = Stage(4), showing(A, 2), showing(B, 2)
    assert step(stage, (first, 0, 3), (second, 0, 6)) == ([3, 0], ["a"])
    assert step(stage, (first, 3, 6), (second, 0, 6)) == ([6, 0], [])
    assert stage.blocked
    assert step(stage, (second, 0, 6)) == ([6], ["b"])


def test_an_aborted_sequences_rows_are_free_for_the_next_step():
    stage, first, second = Stage(4), showing(A, 2), showing(B, 2)
    step(stage, (first, 0, 2))
    stage.leave(first)
    assert first.media_rows is None
    assert step(stage, (second, 0, 6)) == ([6], ["b"])


def test_one_that_left_within_a_step_does_not_give_its_rows_back_twice():
    stage, first, second = Stage(4), showing(A, 2), showing(A, 2)
    assert step(stage, (first, 0, 6), (second, 0, 2)) == ([6, 2], ["a"])
    stage.leave(first)
    other = showing(B)
    assert step(stage, (other, 0, 4)) == ([0], []) and stage.blocked  # `second` still reads A
    assert step(stage, (second, 2, 6)) == ([6], [])
    assert step(stage, (other, 0, 4)) == ([4], ["b"])


def test_one_that_comes_back_keeps_its_pictures_as_long_as_at_first():
    stage, sequence = Stage(4), showing(A, 2)
    step(stage, (sequence, 0, 6))
    stage.begin_step()
    stage.leave(sequence)
    assert step(stage, (sequence, 0, 2)) == ([2], [])
    assert step(stage, (showing(B), 0, 4)) == ([0], [])
    assert step(stage, (sequence, 2, 6)) == ([6], [])


def test_a_picture_that_several_show_is_put_there_once():
    stage, first, second = Stage(8), showing(A, 1, A), showing(3, A)
    assert step(stage, (first, 0, 9), (second, 0, 7)) == ([9, 7], ["a"])
    rows = first.media_rows
    assert rows[:4].tolist() == rows[5:].tolist() == second.media_rows[3:].tolist()
    assert step(stage, (showing(A), 0, 4)) == ([4], [])
    assert stage.encoded == 1


def test_a_shared_picture_stays_while_one_of_them_needs_it():
    stage, first, second = Stage(4), showing(A), showing(A)
    assert step(stage, (first, 0, 4), (second, 0, 1)) == ([4, 1], ["a"])
    assert step(stage, (showing(B), 0, 4)) == ([0], [])
    assert step(stage, (second, 1, 4)) == ([4], [])
    assert step(stage, (showing(B), 0, 4)) == ([4], ["b"])


def test_pictures_that_nobody_needs_go_in_the_order_of_their_last_use():
    stage = Stage(12)
    step(stage, (showing(A, B, C), 0, 12))
    assert step(stage, (showing(A), 0, 4)) == ([4], [])
    assert step(stage, (showing(D), 0, 4)) == ([4], ["d"])  # in B's place
    assert step(stage, (showing(A, C), 0, 8)) == ([8], [])
    assert step(stage, (showing(B), 0, 4)) == ([4], ["b"])  # in D's
    assert step(stage, (showing(A, C), 0, 8)) == ([8], [])


def test_no_more_pictures_go_than_are_in_the_way():
    stage = Stage(12)
    step(stage, (showing(A, B, C), 0, 12))
    assert step(stage, (showing(picture("e", 6)), 0, 6)) == ([6], ["e"])
    assert step(stage, (showing(C), 0, 4)) == ([4], [])


def test_forgotten_pictures_are_put_there_anew_but_not_those_in_use():
    stage, running, other = Stage(8), showing(A, 4), showing(B)
    step(stage, (running, 0, 2), (showing(B), 0, 4))
    stage.begin_step()
    stage.forget()
    assert step(stage, (running, 2, 8), (other, 0, 4)) == ([8, 4], ["b"])
    assert not {*running.media_rows[:4]} & {*other.media_rows}
    stage.reset()
    assert running.media_rows is None
    assert step(stage, (running, 0, 8)) == ([8], ["a"])


def test_a_cached_prefix_needs_no_pictures():
    stage, sequence = Stage(8), showing(A, B, 2)
    assert step(stage, (sequence, 5, 10)) == ([10], ["b"])
    assert step(stage, (showing(A, 3), 4, 7)) == ([7], [])
    # nor is it cut where there is no room for what the prefix has a part of
    assert step(stage, (sequence, 0, 5), (showing(C, 2), 2, 6)) == ([5, 2], ["a"])
    assert stage.blocked


def test_a_step_has_so_many_patches_or_one_picture():
    """Those that are there already cost none."""
    stage, sequence = Stage(40), showing(A, B, C, 2)
    assert step(stage, (sequence, 0, 14), patches=32) == ([8], ["a", "b"])
    assert stage.blocked
    assert step(stage, (sequence, 8, 14), patches=1) == ([14], ["c"])
    assert step(stage, (showing(A, B, D), 0, 12), patches=16) == ([12], ["d"])
    features = Picture(4, b"f", features=np.zeros((4, 8), np.float32))
    other = showing(picture("e", 4), features)
    assert step(stage, (other, 0, 8), patches=16) == ([8], ["e", "f"])


@pytest.mark.parametrize(("stop", "most", "expected"), [
    (2, 100, 2), (3, 100, 3), (4, 100, 3), (6, 100, 3), (7, 100, 7), (9, 100, 8), (12, 100, 12),
])  # fmt: skip
def test_blocks_are_not_cut(stop, most, expected):
    """Before the block that would be cut."""
    stage, sequence = Stage(40), showing(3, A, 1, B, blocks=True)
    assert step(stage, (sequence, 0, stop), most=most)[0] == [expected]


def test_a_block_at_the_start_runs_whole_or_not_at_all():
    stage, sequence = Stage(40), showing(3, A, 1, B, blocks=True)
    assert step(stage, (sequence, 3, 5), most=7) == ([7], ["a"])
    assert not stage.blocked
    assert step(stage, (sequence, 8, 10), most=11) == ([8], [])
    assert stage.blocked
    # no room for the second of two that follow each other
    stage, sequence = Stage(4), showing(1, A, B, blocks=True)
    assert step(stage, (sequence, 0, 9)) == ([5], ["a"])
    assert step(stage, (sequence, 5, 9)) == ([9], ["b"])


def test_pictures_of_one_block_run_together():
    """Where nothing stands between them."""
    sequence = showing(1, A, B, 2, blocks=True)
    sequence.request.media.reach[1:9] = 8
    assert step(Stage(8), (sequence, 0, 7))[0] == [1]
    assert step(Stage(8), (sequence, 1, 7)) == ([9], ["a", "b"])
    stage = Stage(8)
    assert step(stage, (sequence, 0, 11), patches=16) == ([1], ["a"]) and stage.blocked


def runs_of(*pictures, most):
    """The names in each run."""
    starts = np.cumsum([0, *(each.tokens for each in pictures)])
    given = [
        Encoding(each, np.arange(start, start + each.tokens, dtype=np.int32))
        for each, start in zip(pictures, starts, strict=False)
    ]
    runs = pack_runs(given, most)
    for run in runs:
        own = [rows for each, rows in given if each in run.pictures]
        assert run.rows.tolist() == np.concatenate(own).tolist()
        assert run.patches == sum(len(each.patches) for each in run.pictures)
    return ["".join(each.digest.decode() for each in run.pictures) for run in runs]


def test_runs_are_of_one_dtype_and_of_so_many_patches():
    assert runs_of(A, B, C, D, most=32) == ["ab", "cd"]
    assert runs_of(A, B, C, D, most=47) == ["ab", "cd"]
    assert runs_of(A, B, C, most=48) == ["abc"]
    large = picture("l", 4, patches=100)
    assert runs_of(A, large, B, C, most=32) == ["a", "l", "bc"]
    floats = [picture(name, 4, dtype=np.float32) for name in "xy"]
    assert runs_of(A, floats[0], floats[1], B, most=64) == ["a", "xy", "b"]
    features = Picture(4, b"f", features=np.zeros((4, 8), np.float32))
    assert runs_of(A, features, B, most=32) == ["ab"]
    assert runs_of(features, most=32) == []
    (run,) = pack_runs([Encoding(floats[0], np.arange(4, dtype=np.int32))], 64)
    assert run.normalized and not pack_runs([Encoding(A, run.rows)], 64)[0].normalized


@pytest.mark.parametrize("smallest", [12, 16, 576, 676, 1024, 4096])
def test_sizes_of_runs_are_whole_tiles(smallest):
    sizes = _ladder(smallest, 9 * 4096)
    assert sizes == tuple(sorted(set(sizes))) and sizes[0] == smallest
    assert all(size % smallest == 0 for size in sizes) and sizes[-1] >= 9 * 4096
    steps = [(a, b) for a, b in itertools.pairwise(sizes) if a >= 4096 and a >= 4 * smallest]
    assert steps and all(b <= 1.25 * a for a, b in steps)
