"""Options as they are given: by which names, in which normal form, and what is said of them."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, NotSupportedError, UnknownOptionError
from jaxserve.options.table import ALIASES, OPTIONS
from jaxserve.options.upstream import FOREIGN, UPSTREAM

HINTS: Mapping[str, str] = MappingProxyType(
    {
        "tp": "tp_size",
        "tensor_parallel_size": "tp_size",
        "dp": "dp_size",
        "data_parallel_size": "dp_size",
        "model": "model_path",
        "tokenizer": "tokenizer_path",
        "seed": "random_seed",
        "max_model_len": "context_length",
        "gpu_memory_utilization": "mem_fraction_static",
        "max_num_seqs": "max_running_requests",
    }
)
"""What users of other spellings mean; named in the error."""


def default(name: str) -> Any:
    """What an option of jaxserve or of SGLang is where nothing is given."""
    if name in OPTIONS:
        return OPTIONS[name].present_default()
    return copy.copy(FOREIGN[name].default)


def joined(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under their first spellings."""
    given: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, value in options.items():
        target = ALIASES.get(name, name)
        if target in spelled:
            # `asdict` of another version's arguments may carry both spellings, one at its default.
            option, earlier = OPTIONS[target], given[target]
            checked, before = option.check(value), option.check(earlier)
            if option.default not in (checked, before) and checked != before:
                raise InvalidRequestError(
                    f"{spelled[target]}={checks.shown(earlier)} and {name}={checks.shown(value)} "
                    "are the same option"
                )
            if before != option.default:
                continue
        given[target], spelled[target] = value, name
    return given


def checked(name: str, value: Any) -> Any:
    """A value in its normal form, if there is an option of that name that it may have."""
    if name in OPTIONS:
        if value is None and name in UPSTREAM and None in UPSTREAM[name].defaults:
            return OPTIONS[name].default
        return OPTIONS[name].check(value)
    option = FOREIGN.get(name)
    if option is None:
        raise UnknownOptionError(f"unknown option {checks.quoted(name)}{_suggestion(name)}")
    if not option.ignored and not option.is_default(value):
        raise NotSupportedError(f"{name}={checks.shown(value)} is not supported yet")
    if checks.absent(value) and not (option.kind == "bool" and value is False):
        return copy.copy(option.default)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def warn_of_ignored(given: Mapping[str, Any], stacklevel: int) -> None:
    """One warning for all options without a meaning in jaxserve. stacklevel: of whom it is about,
    as `warnings.warn` of the caller would count."""
    ignored = [text for name, value in given.items() if (text := _ignored(name, value))]
    if ignored:
        warnings.warn(
            f"ignored, they have no meaning in jaxserve: {', '.join(ignored)}",
            stacklevel=stacklevel + 1,
        )


def _ignored(name: str, value: Any) -> str:
    """How the warning calls an option whose value has no meaning in jaxserve; empty for others."""
    if name in OPTIONS:
        return f"{name}={value!r}" if OPTIONS[name].is_ignored(value) else ""
    option = FOREIGN[name]
    return name if option.ignored and not option.is_default(value) else ""


def _suggestion(name: str) -> str:
    if name in HINTS:
        return f" (did you mean {HINTS[name]!r}?)"
    return checks.near_matches(name, (*OPTIONS, *UPSTREAM))
