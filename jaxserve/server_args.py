"""The engine's constructor options as one object, SGLang's `ServerArgs`."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxserve import checks
from jaxserve.api import option_flags
from jaxserve.api.option import json_object
from jaxserve.api.option_fields import OptionFields
from jaxserve.api.upstream_options import FOREIGN, UPSTREAM, UpstreamOption
from jaxserve.errors import InvalidRequestError, NotSupportedError, UnknownOptionError
from jaxserve.options import ALIASES, FOREIGN_ATTENTION, HINTS, ONLY_ONE, OPTIONS
from jaxserve.sampling_params import SamplingParams

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    name: (name, *(alias for alias, target in ALIASES.items() if target == name))
    for name in OPTIONS
}
ENVIRONMENT = {"return_original_logprob": "SGLANG_RETURN_ORIGINAL_LOGPROB"}
"""Flags whose default SGLang's users set in the environment."""
TRUE, FALSE = ("true", "1", "yes", "y"), ("false", "0", "no", "n", "")


class _Lockable:
    """Whether an object may change is no option: it is kept apart from the attributes."""

    __slots__ = ("_locked",)


def _field(option: UpstreamOption) -> Any:
    if isinstance(option.default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(option.default))
    return dataclasses.field(default=option.default)


_ALIAS_FIELDS = [
    (alias, Any, dataclasses.field(default=getattr(OptionFields, name), init=False))
    for alias, name in ALIASES.items()
]
"""Second spellings read the same; `dataclasses.replace` passes the first ones only."""

if TYPE_CHECKING:

    class KnownOptions(OptionFields, _Lockable): ...
else:
    KnownOptions = dataclasses.make_dataclass(
        "KnownOptions",
        [*_ALIAS_FIELDS, *((option.name, Any, _field(option)) for option in FOREIGN.values())],
        bases=(OptionFields, _Lockable),
        init=False,
        repr=False,
        eq=False,
    )


@dataclasses.dataclass(init=False, repr=False, eq=False)
class ServerArgs(KnownOptions):
    """Options of `Engine(**kwargs)`; None means "decided by the engine". Meanings: docs/api.md.

    A dataclass whose fields are jaxserve's options and all that SGLang's releases of February and
    August 2026 have. Values are checked when they are given, here or by assignment: of options
    without a meaning in jaxserve, others than SGLang's default cause one warning for all of them;
    of options that it does not support they raise NotSupportedError. Unknown names raise
    UnknownOptionError (a TypeError), values out of range InvalidRequestError. An engine keeps a
    locked copy, whose attributes cannot be assigned.
    """

    def __init__(self, model_path: str | os.PathLike[str] | None = None, **options: Any) -> None:
        if model_path is None:
            raise UnknownOptionError("model_path is required")
        given = _joined({"model_path": model_path, **options})
        checked = {name: _checked(name, value) for name, value in given.items()}
        for field in dataclasses.fields(self):
            if field.name not in ALIASES:
                known = field.name in checked
                self._store(field.name, checked[field.name] if known else default(field))
        self.check_server_args()
        _warn(given)

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_locked", False):
            raise InvalidRequestError(
                f"{name}={checks.shown(value)} comes too late: these are the options of an engine, "
                "which keeps those that it was built with. Assign to a copy (copy.copy) and build "
                "another engine"
            )
        name = ALIASES.get(name, name)
        checked = _checked(name, value)
        _warn({name: value})
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
        given = (
            f"{name}={text}"
            for name, text in shown.items()
            if name not in ALIASES and (name == "model_path" or text != checks.quoted(plain[name]))
        )
        return f"ServerArgs({', '.join(given)})"

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and what is pickled, can be assigned to."""
        return dict(vars(self))

    def _store(self, name: str, value: Any) -> None:
        for spelling in SPELLINGS.get(name, (name,)):
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
        for name in ONLY_ONE:
            if getattr(self, name) > 1:
                raise NotSupportedError(f"{name}={getattr(self, name)} is not supported yet")
        if self.chunked_prefill_size == 0:
            raise InvalidRequestError("chunked_prefill_size must be -1 or at least 1, got 0")
        if self.enable_priority_scheduling and self.schedule_policy != "fcfs":
            raise InvalidRequestError(
                "enable_priority_scheduling goes with schedule_policy='fcfs' only, got "
                f"{self.schedule_policy!r}"
            )
        if self.enable_hierarchical_cache and self.disable_radix_cache:
            raise InvalidRequestError(
                "enable_hierarchical_cache=True keeps cached prefixes in host memory, and "
                "disable_radix_cache=True keeps none"
            )
        if self.enable_deterministic_inference:
            self._check_deterministic()

    def _check_deterministic(self) -> None:
        """The options that ask for more than one decode program."""
        for name, only in (
            ("cuda_graph_bs", None), ("cuda_graph_max_bs", None), ("num_continuous_decode_steps", 1)
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in (None, only):
                raise InvalidRequestError(
                    f"enable_deterministic_inference runs one decode program, of "
                    f"max_running_requests rows and one step: {name}={value!r} contradicts it"
                )

    @property
    def preferred_params(self) -> dict[str, Any]:
        """`preferred_sampling_params` as a dict, empty when not given."""
        return _parsed("preferred_sampling_params", self.preferred_sampling_params)

    @property
    def config_overrides(self) -> dict[str, Any]:
        """`json_model_override_args` as a dict."""
        return _parsed("json_model_override_args", self.json_model_override_args)

    @property
    def attention_implementation(self) -> str | None:
        """The kernel implementation asked for, None for the best one of the device."""
        name = self.attention_backend
        return None if name in FOREIGN_ATTENTION else name

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
        fields = {field.name: field for field in dataclasses.fields(ServerArgs)}
        defaults = {name: default(fields[name]) for name in OPTIONS if name != "model_path"}
        option_flags.add(parser, defaults)

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


def default(field: dataclasses.Field[Any]) -> Any:
    """An option's default, which the environment may say."""
    if field.name in ENVIRONMENT:
        return _environment_flag(ENVIRONMENT[field.name])
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _environment_flag(variable: str) -> bool:
    value = os.environ.get(variable, "").strip().lower()
    if value not in TRUE and value not in FALSE:
        raise InvalidRequestError(
            f"the environment variable {variable} must be one of {', '.join(TRUE + FALSE[:-1])}, "
            f"got {checks.shown(value)}"
        )
    return value in TRUE


def _joined(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under their first spellings."""
    given: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, value in options.items():
        target = ALIASES.get(name, name)
        if target in spelled:
            # `asdict` of another version's arguments may carry both spellings, one at its default.
            standard, earlier = getattr(OptionFields, target), given[target]
            checked, before = (OPTIONS[target].check(target, item) for item in (value, earlier))
            if standard not in (checked, before) and checked != before:
                raise InvalidRequestError(
                    f"{spelled[target]}={checks.shown(earlier)} and {name}={checks.shown(value)} "
                    "are the same option"
                )
            if before != standard:
                continue
        given[target], spelled[target] = value, name
    return given


def _checked(name: str, value: Any) -> Any:
    """A value in its normal form, if there is an option of that name that it may have."""
    if name in OPTIONS:
        if value is None and name in UPSTREAM and None in UPSTREAM[name].defaults:
            return getattr(OptionFields, name)
        if name == "attention_backend" and isinstance(value, str) and value in FOREIGN_ATTENTION:
            return value
        checked = OPTIONS[name].check(name, value)
        if name == "preferred_sampling_params":
            SamplingParams.from_dict(_parsed(name, checked))
        return checked
    option = FOREIGN.get(name)
    if option is None:
        raise UnknownOptionError(f"unknown option {checks.quoted(name)}{_suggestion(name)}")
    if option.treatment == "unsupported" and not option.is_default(value):
        raise NotSupportedError(f"{name}={checks.shown(value)} is not supported yet")
    if checks.absent(value) and not (option.kind == "bool" and value is False):
        return copy.copy(option.default)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _is_ignored(name: str, value: Any) -> bool:
    """Whether a value asks for something that has no meaning in jaxserve."""
    if name == "attention_backend":
        return isinstance(value, str) and value in FOREIGN_ATTENTION
    option = FOREIGN.get(name)
    return option is not None and option.treatment == "ignored" and not option.is_default(value)


def _warn(given: Mapping[str, Any]) -> None:
    """One warning for all options without a meaning in jaxserve."""
    ignored = [
        f"{name}={value!r}" if name == "attention_backend" else name
        for name, value in given.items()
        if _is_ignored(name, value)
    ]
    if ignored:
        warnings.warn(
            f"ignored, they have no meaning in jaxserve: {', '.join(ignored)}", stacklevel=3
        )


def _parsed(name: str, value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if value is None else json_object(name, value)


def _suggestion(name: str) -> str:
    if name in HINTS:
        return f" (did you mean {HINTS[name]!r}?)"
    return checks.near_matches(name, (*OPTIONS, *UPSTREAM))


ServerArgs.__signature__ = _signature()  # pyright: ignore[reportAttributeAccessIssue]
