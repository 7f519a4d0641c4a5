"""The engine's constructor options as one object, SGLang's `ServerArgs`."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, UnknownOptionError
from jaxserve.options import (
    ALIASES,
    FOREIGN,
    OPTIONS,
    UPSTREAM,
    Options,
    UpstreamOption,
    command_line,
    given,
)
from jaxserve.options.option import json_object
from jaxserve.options.together import check_together


class _Lockable:
    """Whether an object may change is no option: it is kept apart from the attributes."""

    __slots__ = ("_locked",)


def _field(option: UpstreamOption) -> Any:
    if isinstance(option.default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(option.default))
    return dataclasses.field(default=option.default)


_ALIAS_FIELDS = [
    (alias, Any, dataclasses.field(default=OPTIONS[name].default, init=False))
    for alias, name in ALIASES.items()
]
"""Second spellings read the same; `dataclasses.replace` passes the first ones only."""

if TYPE_CHECKING:

    class KnownOptions(Options, _Lockable): ...
else:
    KnownOptions = dataclasses.make_dataclass(
        "KnownOptions",
        [*_ALIAS_FIELDS, *((option.name, Any, _field(option)) for option in FOREIGN.values())],
        bases=(Options, _Lockable),
        init=False,
        repr=False,
        eq=False,
    )


@dataclasses.dataclass(init=False, repr=False, eq=False)
class ServerArgs(KnownOptions):
    """Options of `Engine(**kwargs)`; None means "decided by the engine". Meanings: docs/api.md.

    A dataclass whose fields are jaxserve's options (`jaxserve.options.table`) and all that SGLang's
    releases of February and August 2026 have. Values are checked when they are given, here or by
    assignment: of options without a meaning in jaxserve, others than SGLang's default cause one
    warning for all of them; of options that it does not support they raise NotSupportedError.
    Unknown names raise UnknownOptionError (a TypeError), values out of range InvalidRequestError.
    An engine keeps a locked copy, whose attributes cannot be assigned.
    """

    def __init__(self, model_path: str | os.PathLike[str] | None = None, **options: Any) -> None:
        if model_path is None:
            raise UnknownOptionError("model_path is required")
        wanted = given.joined({"model_path": model_path, **options})
        values = {name: given.checked(name, value) for name, value in wanted.items()}
        for name in (*OPTIONS, *FOREIGN):
            self._store(name, values[name] if name in values else given.default(name))
        self.check_server_args()
        given.warn_of_ignored(wanted, stacklevel=2)

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_locked", False):
            raise InvalidRequestError(
                f"{name}={checks.shown(value)} comes too late: these are the options of an engine, "
                "which keeps those that it was built with. Assign to a copy (copy.copy) and build "
                "another engine"
            )
        name = ALIASES.get(name, name)
        checked = given.checked(name, value)
        given.warn_of_ignored({name: value}, stacklevel=2)
        self._store(name, checked)

    def __delattr__(self, name: str) -> None:
        raise InvalidRequestError(f"{name} cannot be deleted: options have values")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ServerArgs):
            return NotImplemented
        return vars(self) == vars(other)

    def __repr__(self) -> str:
        """The options that are not at their defaults, shortened where they are long."""
        plain = vars(ServerArgs(self.model_path))
        shown = {name: checks.quoted(value) for name, value in vars(self).items()}
        changed = (
            f"{name}={text}"
            for name, text in shown.items()
            if name not in ALIASES and (name == "model_path" or text != checks.quoted(plain[name]))
        )
        return f"ServerArgs({', '.join(changed)})"

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and what is pickled, can be assigned to."""
        return dict(vars(self))

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        for spelling in OPTIONS[name].spellings if name in OPTIONS else ():
            object.__setattr__(self, spelling, value)

    def locked(self) -> ServerArgs:
        """A copy that cannot be changed, for an engine to keep. Raises what `check_server_args`
        does."""
        self.check_server_args()
        kept = copy.copy(self)
        object.__setattr__(kept, "_locked", True)
        return kept

    def check_server_args(self) -> None:
        """Raises InvalidRequestError for options that contradict each other, NotSupportedError for
        parallelism."""
        check_together(self)

    @property
    def preferred_params(self) -> dict[str, Any]:
        """`preferred_sampling_params` as a dict, empty when not given."""
        return _parsed("preferred_sampling_params", self.preferred_sampling_params)

    @property
    def config_overrides(self) -> dict[str, Any]:
        """`json_model_override_args` as a dict."""
        return _parsed("json_model_override_args", self.json_model_override_args)

    def url(self) -> str:
        """Where SGLang's server with these options would listen. (jaxserve has none: clients print
        and compare it.)"""
        values = vars(self)
        host, port = (
            value if isinstance(value, str) else checks.quoted(value)
            for value in (values["host"], values["port"])
        )
        scheme = "https" if values["ssl_certfile"] is not None else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Adds a flag for each option, those without effect included. See `from_cli_args`."""
        command_line.add(parser)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> ServerArgs:
        """The options of parsed flags; attributes of `args` that are no options are left alone."""
        known = {**OPTIONS, **UPSTREAM}
        return cls(**{name: value for name, value in vars(args).items() if name in known})


def _signature() -> inspect.Signature:
    """What `inspect.signature(ServerArgs)` says. Clients look there for a release's options."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    names = [field.name for field in dataclasses.fields(ServerArgs) if field.name != "model_path"]
    return inspect.Signature(
        [
            inspect.Parameter("model_path", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(inspect.Parameter(name, keyword, default=None) for name in names),
        ]
    )


def _parsed(name: str, value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if value is None else json_object(name, value)


ServerArgs.__signature__ = _signature()  # pyright: ignore[reportAttributeAccessIssue]
