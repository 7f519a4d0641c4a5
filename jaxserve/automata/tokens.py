"""An automaton over bytes, told in tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxserve.automata.budget import Budget
from jaxserve.automata.pattern import parse
from jaxserve.automata.states import Automaton, automaton

MOST_ENTRIES = 1 << 24
"""States times classes of tokens: 32 MiB."""
NEVER, END = 0, 1
"""Classes: of tokens that match nowhere, and of those that end a text."""


class TokenTable(NamedTuple):
    """S states, of which 0 is the first and the last one that behind the end; C classes of tokens
    that lead to the same states."""

    next: np.ndarray
    """[S, C] int16: the state behind a token; -1: it may not come."""
    classes: np.ndarray
    """[n] int32: of each token."""


def token_table(
    regex: str, tokens: Sequence[bytes | None], ends: Iterable[int], seconds: float
) -> TokenTable:
    """Which tokens go on with a text that `regex` matches as a whole (Willard and Louf 2023,
    arXiv 2307.09702). tokens: what each stands for; None: for no text. ends: tokens that may come
    where the text matches, and behind which only they may come. Takes at most `seconds`.
    InvalidRequestError: the expression is wrong or too large, or no tokens match it."""
    budget = Budget(regex, seconds)
    found = automaton(parse(regex), budget)
    size = len(found.accepts)
    if size == 0:
        raise budget.dead()
    columns, classes = _columns(found, tokens, budget)
    classes[list(ends)] = END
    table = np.full((size + 1, columns.shape[1]), -1, np.int16)
    table[:size] = np.where(columns < size, columns, -1)
    table[:size, END] = np.where(found.accepts, size, -1)
    table[size, END] = size
    _trim(table, found, tokens, budget)
    return TokenTable(table, classes)


def _columns(
    found: Automaton, tokens: Sequence[bytes | None], budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """The states behind each class of tokens [S, C], by the state before; the classes [n]. NEVER
    and END are left out, which lead nowhere.

    A token is a function of states, and that of its first bytes followed by that of its last one.
    There are few such functions (the automaton's transition monoid), so that each is made once.
    """
    size, kinds = len(found.accepts), found.next.shape[1]
    texts = [text or b"" for text in tokens]
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths) - lengths
    letters = found.classes[np.frombuffer(b"".join(texts), np.uint8)]
    nowhere = np.full(size, size, np.int32)
    functions, numbers = [nowhere, np.arange(size, dtype=np.int32)], {nowhere.tobytes(): 0}
    numbers[functions[1].tobytes()] = 1
    known: dict[int, int] = {}

    def behind(pair: int) -> int:
        """The number of the function `pair // kinds`, then a byte of the class `pair % kinds`."""
        if pair not in known:
            made = found.next[functions[pair // kinds], pair % kinds]
            key = made.tobytes()
            if key not in numbers:
                numbers[key] = len(functions)
                functions.append(made)
                entries = size * len(functions)
                budget.check(
                    f"entries ({size:,} states and the kinds of tokens)", entries, MOST_ENTRIES
                )
            known[pair] = numbers[key]
        return known[pair]

    of_token = np.where(lengths > 0, 1, 0)
    for depth in range(int(lengths.max(initial=0))):
        alive = np.flatnonzero((lengths > depth) & (of_token != 0))
        pairs = of_token[alive] * kinds + letters[starts[alive] + depth]
        distinct, which = np.unique(pairs, return_inverse=True)
        of_token[alive] = np.array([behind(int(pair)) for pair in distinct], np.int64)[which]
    used, which = np.unique(np.append(of_token, 0), return_inverse=True)
    columns = np.stack([nowhere, nowhere, *(functions[number] for number in used[1:])], axis=1)
    classes = np.where(which > 0, which + 1, NEVER)[:-1]
    return columns, classes.astype(np.int32)


def _trim(
    table: np.ndarray, found: Automaton, tokens: Sequence[bytes | None], budget: Budget
) -> None:
    """Without the tokens behind which no others lead to the end. Where each byte that matters is a
    token there are none."""
    alone = {text[0] for text in tokens if text is not None and len(text) == 1}
    wanted = np.unique(np.argwhere(found.next < len(found.accepts))[:, 1])
    if not {*wanted} <= {found.classes[byte] for byte in alone}:
        live = np.append(found.accepts, True)
        while True:
            budget.check("states", 0, len(live))
            leads = (table >= 0) & live[table]
            more = live | leads.any(axis=1)
            if (more == live).all():
                break
            live = more
        table[~leads] = -1
    if not (table[0] >= 0).any():
        raise budget.dead()
