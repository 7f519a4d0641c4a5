"""Questions to one engine, many at a time; what fails costs its own row."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.batch.columns import KINDS, Asking, Question
from jaxserve.batch.rows import Row
from jaxserve.errors import (
    EngineDeadError,
    EngineShutdownError,
    ForkedProcessError,
    JaxserveError,
)

if TYPE_CHECKING:
    from jaxserve.engine import Engine

ENGINE_IS_GONE = (EngineDeadError, EngineShutdownError, ForkedProcessError)
"""Errors that no row is to blame for."""

Answer = Mapping[str, Any] | str
"""A result dict of `Engine.generate`, or why there is none."""


def answers(engine: Engine, asking: Asking, rows: Sequence[Row]) -> list[Answer]:
    """Of each row. Raises EngineDeadError and EngineShutdownError."""
    found: dict[int, Answer] = {}
    questions: dict[int, Question] = {}
    for place, row in enumerate(rows):
        if row.error is not None:
            found[place] = row.error
            continue
        try:
            questions[place] = asking.question(row.index, row.values)
        except JaxserveError as error:
            found[place] = described(error)
    for kind in KINDS:
        places = [place for place, question in questions.items() if question.kind == kind]
        asked = [questions[place] for place in places]
        found.update(zip(places, _ask(engine, asked), strict=True))
    return [found[place] for place in range(len(rows))]


def described(error: BaseException) -> str:
    """As the output's column `error` has it."""
    return f"{type(error).__name__}: {error}"


def _ask(engine: Engine, asked: Sequence[Question]) -> Sequence[Answer]:
    """All in one call, which is checked and encoded at once. It fails as a whole: then each is a
    call of its own, as each is at once where there are images: one that cannot be read would have
    the others read twice."""
    if not asked:
        return []
    if any(question.may_show for question in asked):
        return asyncio.run(_ask_each(engine, asked))
    try:
        return _generate(engine, asked)
    except ENGINE_IS_GONE:
        raise
    except JaxserveError:
        return asyncio.run(_ask_each(engine, asked))


def _generate(engine: Engine, asked: Sequence[Question]) -> list[dict[str, Any]]:
    values, params = [question.value for question in asked], [question.params for question in asked]
    match asked[0].kind:
        case "prompt":
            return engine.generate(values, params)
        case "messages":
            return engine.chat(values, params)
        case "input_ids":
            return engine.generate(input_ids=values, sampling_params=params)


async def _ask_each(engine: Engine, asked: Sequence[Question]) -> list[Answer]:
    return await asyncio.gather(*(_ask_one(engine, question) for question in asked))


async def _ask_one(engine: Engine, question: Question) -> Answer:
    value, params, images = question.value, question.params, question.images
    try:
        match question.kind:
            case "prompt":
                return await engine.async_generate(value, params, image_data=images)
            case "messages":
                return await engine.async_chat(value, params)
            case "input_ids":
                return await engine.async_generate(
                    input_ids=value, sampling_params=params, image_data=images
                )
    except ENGINE_IS_GONE:
        raise
    except JaxserveError as error:
        return described(error)
