"""The argument `custom_logit_processor`."""

from __future__ import annotations

from typing import Any

from jaxserve import checks
from jaxserve.api.extras import Asking
from jaxserve.api.prompts import NamingRow, per_row
from jaxserve.errors import InvalidRequestError
from jaxserve.processors.guide import ProcessorSpec
from jaxserve.processors.processor import CustomLogitProcessor

NAME = "custom_logit_processor"


def processor_specs(asking: Asking) -> list[ProcessorSpec | None] | None:
    """A processor for each prompt, or None where no argument speaks of any."""
    given = asking.given.custom_logit_processor
    if checks.absent(given):
        found: list[ProcessorSpec | None] = [None] * asking.prompts
    else:
        found = []
        for index, value in enumerate(per_row(NAME, given, asking.prompts)):
            with NamingRow(index, isinstance(given, list | tuple) and not asking.single):
                found.append(_spec(value, asking))
    for index, (spec, params) in enumerate(zip(found, asking.params, strict=True)):
        if params.custom_params and spec is None:
            with NamingRow(index, not asking.single):
                raise InvalidRequestError(
                    "custom_params are read by a logit processor, and no custom_logit_processor is "
                    f"given: {checks.shown(params.custom_params)}"
                )
    return found if any(found) else None


def _spec(value: Any, asking: Asking) -> ProcessorSpec | None:
    """Of one prompt; a class, an object, or what `to_str` has made of a class."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        if not asking.options.enable_custom_logit_processor:
            raise InvalidRequestError(
                f"{NAME} as a string runs what the string says: it needs "
                f"Engine(enable_custom_logit_processor=True), got {checks.shown(value)}"
            )
        return ProcessorSpec(lambda: CustomLogitProcessor.from_str(value))
    if isinstance(value, type) and any("__call__" in each.__dict__ for each in value.__mro__):
        return ProcessorSpec(value)
    if callable(value) and not isinstance(value, type):
        return ProcessorSpec(lambda: value)
    raise InvalidRequestError(
        f"{NAME} must be a CustomLogitProcessor, a class of them or its to_str(), got "
        f"{checks.shown(value)}"
    )
