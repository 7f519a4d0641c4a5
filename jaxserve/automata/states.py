"""A regular expression as a deterministic automaton over bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxserve.automata.budget import Budget
from jaxserve.automata.characters import Spelling, spelling
from jaxserve.automata.pattern import Characters, Choice, Node, Repeat, Sequence

MOST_STATES = 16_384
"""Of the automaton over bytes, before equal states are merged."""
MOST_PLACES = 16 * MOST_STATES
"""In an expression whose repetitions are written out."""


class Automaton(NamedTuple):
    """S states, of which 0 is the first."""

    next: np.ndarray
    """[S + 1, C] int32: the state behind each class of bytes. S is where nothing matches any more,
    and leads to itself."""
    accepts: np.ndarray
    """[S] bool: where the text matches."""
    classes: np.ndarray
    """[256] int32: of each byte. Bytes of one class lead to the same states."""


def automaton(node: Node, budget: Budget) -> Automaton:
    """The smallest one of `node`. InvalidRequestError: of the budget."""
    places = _Places(budget)
    last = places.add(node, 0)
    return _merged(_determined(places, last, budget), budget)


class _Places:
    """Places in an expression (Thompson 1968), 0 its beginning."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.steps: list[list[tuple[int, int, int]]] = [[]]
        """From each place: from a byte to another, both included, and the place behind them."""
        self.jumps: list[list[int]] = [[]]
        """From each place: those that are reached without a byte."""
        self._spelled: dict[Characters, Spelling] = {}

    def add(self, node: Node, start: int) -> int:
        """The place behind `node`, which begins at `start`."""
        match node:
            case Characters():
                if node not in self._spelled:
                    self._spelled[node] = spelling(node.ranges)
                end = self._new()
                self._spell(self._spelled[node], start, end, {})
                return end
            case Sequence():
                for part in node.parts:
                    start = self.add(part, start)
                return start
            case Choice():
                end = self._new()
                for part in node.parts:
                    self.jumps[self.add(part, self._new(start))].append(end)
                return end
            case Repeat():
                return self._repeat(node, start)

    def _repeat(self, node: Repeat, start: int) -> int:
        for _ in range(node.least):
            start = self.add(node.part, start)
        end = self._new()
        if node.most is None:
            start = self._new(start)
            self.jumps[self.add(node.part, start)].append(start)
        for _ in range((node.most or node.least) - node.least):
            self.jumps[start].append(end)
            start = self.add(node.part, start)
        self.jumps[start].append(end)
        return end

    def _spell(self, spelled: Spelling, start: int, end: int, known: dict[int, int]) -> None:
        for low, high, rest in spelled:
            behind = end
            if rest is not None:
                if id(rest) not in known:
                    known[id(rest)] = self._new()
                    self._spell(rest, known[id(rest)], end, known)
                behind = known[id(rest)]
            self.steps[start].append((low, high, behind))

    def _new(self, behind: int | None = None) -> int:
        """A place; behind: to which that one leads without a byte."""
        self.steps.append([])
        self.jumps.append([])
        self._budget.check("places", len(self.steps), MOST_PLACES)
        if behind is not None:
            self.jumps[behind].append(len(self.steps) - 1)
        return len(self.steps) - 1


def _determined(places: _Places, last: int, budget: Budget) -> Automaton:
    """Sets of places as states (Rabin and Scott 1959)."""
    edges = {edge for steps in places.steps for low, high, _ in steps for edge in (low, high + 1)}
    classes = np.isin(np.arange(256), sorted(edges - {0})).cumsum().astype(np.int32)
    of_byte, count = classes.tolist(), int(classes[-1]) + 1

    def together(found: set[int]) -> frozenset[int]:
        """With all that is reached without a byte, of which only what goes on matters."""
        todo = list(found)
        while todo:
            for place in places.jumps[todo.pop()]:
                if place not in found:
                    found.add(place)
                    todo.append(place)
        return frozenset(place for place in found if places.steps[place] or place == last)

    numbers = {together({0}): 0}
    rows: list[list[int]] = []
    todo = list(numbers)
    for state in todo:  # which grows
        budget.check("states", len(numbers), MOST_STATES)
        behind: dict[int, set[int]] = {}
        for place in state:
            for low, high, to in places.steps[place]:
                for each in range(of_byte[low], of_byte[high] + 1):
                    behind.setdefault(each, set()).add(to)
        row = [-1] * count
        for each, found in behind.items():
            target = together(found)
            if target not in numbers:
                numbers[target] = len(numbers)
                todo.append(target)
            row[each] = numbers[target]
        rows.append(row)
    table = np.array([*rows, [-1] * count], np.int32)
    table[table < 0] = len(rows)
    accepts = np.array([last in state for state in todo])
    return Automaton(table, accepts, classes)


def _merged(found: Automaton, budget: Budget) -> Automaton:
    """With equal states as one (Moore 1956), in the order in which they are reached."""
    accepts = np.append(found.accepts, False)
    block, count = accepts.astype(np.int32), 0
    while True:
        budget.check("states", 0, MOST_STATES)
        told = np.concatenate([block[:, None], block[found.next]], axis=1)
        _, first, block = np.unique(told, axis=0, return_index=True, return_inverse=True)
        block = block.reshape(-1)
        if len(first) == count:
            break
        count = len(first)
    dead = block[-1]
    order = [number for number in np.argsort(first) if number != dead] + [dead]
    renumbered = np.empty(count, np.int32)
    renumbered[order] = np.arange(count)
    table = renumbered[block][found.next[first[order]]]
    return Automaton(table, accepts[first[order]][:-1], found.classes)
