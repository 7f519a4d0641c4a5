"""The packed vector of an extend step, against what its batch says row by row."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxserve.mailbox import Mailbox
from jaxserve.output.logprobs import LogprobSpec
from jaxserve.packing.batch import ExtendBatch, ExtendRow
from jaxserve.packing.layout import TOKEN_FIELDS, ExtendLayout, RowFields, TokenField
from jaxserve.packing.pack import pack_extend
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Slots
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams

LAYOUT = ExtendLayout(tokens=64, rows=8, table_width=5)
PADDING = 16


def sequence(slots, number, prompt, **fields):
    request = Request(
        rid=str(number), index=number, prompt_ids=prompt, max_new_tokens=9,
        params=SamplingParams(temperature=0.5, top_k=7, min_p=0.25), stop_ids=frozenset(),
        masked_ids=(), seed=(1 << 32) - 1 - number, sample_index=number, mailbox=Mailbox(),
        **fields,
    )  # fmt: skip
    made = Sequence(request, number, slots)
    made.slot = slots.take(request)
    made.pages = [10 * number + page for page in range(-(-len(prompt) // 16))]
    return made


@pytest.fixture
def rows():
    """A whole prompt, a fork of it, the second chunk of a longer one that wants input logprobs,
    and a running sequence's next token."""
    slots = Slots(PADDING)
    whole, fork = (sequence(slots, number, [*range(100, 120)]) for number in (0, 1))
    chunk = sequence(slots, 2, [*range(200, 240)], extras=(LogprobSpec(0, 2, (3,)).extra(40),))
    running = sequence(slots, 3, [*range(300, 310)])
    return (
        ExtendRow(whole, 0, 20, 0, samples=True, fresh=True, epoch=0),
        ExtendRow(chunk, 16, 32, 24, samples=False, fresh=False, epoch=0),
        ExtendRow(running, 10, 11, 40, samples=True, fresh=False, epoch=0, carried=True),
        ExtendRow(fork, 20, 20, 0, samples=True, fresh=True, epoch=0, leader=0),
    )


def test_each_row_is_packed_as_its_batch_says(rows):
    out = LAYOUT.unpack(pack_extend(ExtendBatch(rows, 64, 8), LAYOUT, PADDING))
    tokens = np.zeros(64, np.int32)
    tokens[:20], tokens[24:40] = range(100, 120), range(216, 232)
    assert out.per_token.keys() == {"tokens"}
    np.testing.assert_array_equal(out.per_token["tokens"], tokens)
    fields = {
        "slots": [row.sequence.slot for row in rows],
        "q_starts": [0, 24, 40, 64],
        "q_lens": [20, 16, 1, 0],
        "prefix_lens": [0, 16, 10, 0],
        "new_lengths": [20, 32, 11, 20],
        "sample_at": [19, -1, 40, 19],
        "fresh": [1, 0, 0, 1],
        "next_tokens": [-1, 232, -1, -1],
        "wants_prompt": [0, 1, 0, 0],
        "carried": [0, 0, 1, 0],
    }
    assert fields.keys() == set(RowFields._fields)
    for name, values in fields.items():
        assert getattr(out.rows, name)[:4].tolist() == values, name
    for table, row in zip(out.page_table, rows, strict=False):
        pages = row.sequence.pages
        assert table.tolist() == pages + [0] * (5 - len(pages))
    assert out.floats[:4].tolist() == [[0.5, 1.0, 0.25, 0.0, 0.0, 1.0]] * 4
    assert out.ints[1].tolist() == [7, -3, 2, 40, 0, 0, 1, 2, 1]
    assert out.ints[[0, 2, 3]].tolist() == [
        [7, -1 - s.request.sample_index, s.request.sample_index, s.prompt_len, 0, 0, 0, 0, 0]
        for s in (rows[0].sequence, rows[2].sequence, rows[3].sequence)
    ]


def test_padding_rows_belong_to_no_slot_and_sample_nothing(rows):
    out = LAYOUT.unpack(pack_extend(ExtendBatch(rows, 64, 8), LAYOUT, PADDING))
    padding = {"slots": PADDING, "q_starts": 64, "sample_at": -1, "next_tokens": -1}
    for name, column in out.rows._asdict().items():
        assert (column[4:] == padding.get(name, 0)).all(), name
    assert not out.page_table[4:].any()
    assert out.floats[4:].tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0, 1.0]] * 4
    assert out.ints[4:].tolist() == [[1] + [0] * 8] * 4


def test_a_further_field_of_each_token_is_an_entry_and_its_writer(rows):
    """Three numbers a token, behind its id; nothing else of the vector's content changes."""

    def write(sequence, start, stop):
        return [np.arange(start, stop) * scale for scale in (1, 10, sequence.slot)]

    layout = dataclasses.replace(LAYOUT, fields=(*TOKEN_FIELDS, TokenField("axes", write, (3,))))
    assert layout.size == LAYOUT.size + 3 * 64
    packed = [pack_extend(ExtendBatch(rows, 64, 8), x, PADDING) for x in (LAYOUT, layout)]
    plain, out = LAYOUT.unpack(packed[0]), layout.unpack(packed[1])
    axes = np.zeros((3, 64), np.int32)
    for row in rows[:2]:  # the others run no token whose id the host knows
        at = slice(row.packed_start, row.packed_start + row.stop - row.start)
        axes[:, at] = write(row.sequence, row.start, row.stop)
    np.testing.assert_array_equal(out.per_token["axes"], axes)
    np.testing.assert_array_equal(out.per_token["tokens"], plain.per_token["tokens"])
    for one, other in zip([*plain.rows, *plain[2:]], [*out.rows, *out[2:]], strict=True):
        np.testing.assert_array_equal(one, other)
