"""What one constructor option is, and the normal forms of its values."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, NotSupportedError

LONGEST_TEXT = 1 << 20
"""Characters; a chat template has a few thousand."""
LARGEST_SIZE = (1 << 31) - 1
"""Sizes and counts are int32 on the device."""
DTYPE_SPELLINGS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
"""Type objects of array libraries whose names are not SGLang's."""
LEVEL_SPELLINGS = {"warn": "warning", "fatal": "critical"}
TRUE, FALSE = ("true", "1", "yes", "y"), ("false", "0", "no", "n", "")
"""What a flag's environment variable may say, in any case."""
METADATA = "option"
"""Under which a dataclass field keeps its Option."""

MESH_AXES = ("data", "tensor")
"""Of the option `mesh`: replicas, and the parts that each layer is cut into."""

Kind = Literal[
    "text",
    "path",
    "dtype",
    "level",
    "flag",
    "integer",
    "number",
    "integers",
    "strings",
    "json",
    "mesh",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Everything about one option; `jaxserve.options.table` has one for each."""

    name: str = ""
    """The attribute's, filled in by the table."""
    type: str = ""
    """Of the attribute, as annotated in the table."""
    default: Any = None
    """`dataclasses.MISSING`: it must be given."""
    kind: Kind
    """path: or os.PathLike. dtype: a name, or a type object of NumPy, JAX or PyTorch. level: a name
    in any case. integers, strings: a list. json: a JSON object, as text or dict. mesh: a JAX
    object, which no command line has."""
    help: str
    """One sentence, without a full stop."""
    low: float | None = None
    """The least value; None is any."""
    high: float | None = None
    """The largest value; None is any."""
    choices: tuple[str, ...] = ()
    """The values implemented; empty is any."""
    known: tuple[str, ...] = ()
    """Values that SGLang knows and jaxserve does not implement: NotSupportedError."""
    ignored: tuple[str, ...] = ()
    """Values that have no meaning here: they cause a warning, and do what the default does."""
    only: int | None = None
    """The one size that an engine can be built with; others are NotSupportedError there."""
    then: Callable[[dict[str, Any]], object] | None = None
    """Raises for a JSON object that this option cannot be."""
    spellings: tuple[str, ...] = ()
    """Further names, everywhere (SGLang renamed some in 2026)."""
    flags: tuple[str, ...] = ()
    """Further names on the command line only."""
    environment: str | None = None
    """Of a flag: the variable in which SGLang's users set its default."""

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def optional(self) -> bool:
        """Whether None is allowed, which means "decided by the engine"."""
        return self.type.endswith("| None")

    def present_default(self) -> Any:
        """What holds where nothing is given, now. InvalidRequestError: the environment says
        neither yes nor no."""
        if self.environment is None:
            return self.default
        value = os.environ.get(self.environment, "").strip().lower()
        if value not in TRUE and value not in FALSE:
            raise InvalidRequestError(
                f"the environment variable {self.environment} must be one of "
                f"{', '.join(TRUE + FALSE[:-1])}, got {checks.shown(value)}"
            )
        return value in TRUE

    def is_ignored(self, value: Any) -> bool:
        """Whether a value is one of `ignored`."""
        return isinstance(value, str) and value in self.ignored

    def effective(self, value: Any) -> Any:
        """What a value does: that of the default where it is ignored."""
        return self.default if self.is_ignored(value) else value

    def check(self, value: Any) -> Any:
        """The value in its normal form. Raises InvalidRequestError or NotSupportedError."""
        name = self.name
        if (value is None and self.optional) or self.is_ignored(value):
            return value
        match self.kind:
            case "flag":
                return checks.boolean(name, value)
            case "integer":
                high = LARGEST_SIZE if self.high is None else int(self.high)
                return checks.integer(name, value, _whole(self.low), high)
            case "number":
                return checks.number(name, value, self.low, self.high)
            case "integers":
                return _integers(name, value, _whole(self.low))
            case "strings":
                return checks.strings(name, value)
            case "json":
                return self._json_object(value)
            case "mesh":
                return _mesh(name, value)
            case "path":
                return self._chosen(_path(name, value))
            case "dtype":
                return self._chosen(_dtype_name(value))
            case "level" if isinstance(value, str):
                value = value.lower()
                return self._chosen(LEVEL_SPELLINGS.get(value, value))
        return self._chosen(value)

    def _chosen(self, value: Any) -> str:
        checks.text(self.name, value, LONGEST_TEXT)
        if value in self.known:
            raise NotSupportedError(
                f"{self.name}={value!r} is not supported yet; jaxserve has "
                f"{', '.join(self.choices)}"
            )
        if self.choices and value not in self.choices:
            raise InvalidRequestError(
                f"{self.name} must be one of {', '.join(self.choices)}, got {checks.shown(value)}"
            )
        return value

    def _json_object(self, value: Any) -> Any:
        """Text stays text, as it is what the attribute reads upstream."""
        parsed = json_object(self.name, value)
        if self.then is not None:
            self.then(parsed)
        return value if isinstance(value, str) else parsed


def option(kind: Kind, default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that is an option. more: further fields of Option."""
    described = Option(kind=kind, default=default, help=help, **more)
    return dataclasses.field(default=default, metadata={METADATA: described})


def described(table: type[Any]) -> dict[str, Option]:
    """The options of a dataclass by name, in its order."""
    return {
        field.name: dataclasses.replace(
            field.metadata[METADATA], name=field.name, type=str(field.type)
        )
        for field in dataclasses.fields(table)
    }


def json_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object given as text or as a dict, parsed. Raises InvalidRequestError."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(checks.text(name, value, LONGEST_TEXT))
        except (ValueError, RecursionError) as error:  # ValueError: also of 4,300 digits
            if isinstance(error, InvalidRequestError):
                raise
            raise InvalidRequestError(
                f"{name} is not valid JSON: {error}; got {checks.shown(value)}"
            ) from error
    if not isinstance(parsed, Mapping):
        raise InvalidRequestError(f"{name} must be a JSON object, got {checks.shown(value)}")
    return checks.json_value(name, parsed)


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)


def _integers(name: str, value: Any, low: int | None) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        kind = "positive integers" if low == 1 else "integers"
        raise InvalidRequestError(f"{name} must be a list of {kind}, got {checks.shown(value)}")
    least = -LARGEST_SIZE if low is None else low
    return tuple(checks.integers(name, value, least, checks.MOST_STRINGS))


def _mesh(name: str, value: Any) -> Any:
    """A jax.sharding.Mesh with the right axes; JAX need not be imported to tell."""
    kind = type(value)
    if kind.__name__ != "Mesh" or kind.__module__.split(".")[0] != "jax":
        raise InvalidRequestError(
            f"{name} must be a jax.sharding.Mesh with the axes {MESH_AXES}, got "
            f"{checks.shown(value)}"
        )
    if tuple(value.axis_names) != MESH_AXES:
        raise InvalidRequestError(
            f"{name} must have the axes {MESH_AXES}, in this order; got a Mesh with the axes "
            f"{tuple(value.axis_names)} of sizes {tuple(value.devices.shape)}"
        )
    return value


def _path(name: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and "\0" in value:
        raise InvalidRequestError(f"{name} has a NUL character, got {checks.shown(value)}")
    return value


def _dtype_name(value: Any) -> Any:
    """`bfloat16` of torch.bfloat16, jnp.bfloat16 or np.dtype("bfloat16"), without importing them;
    anything else as it is."""
    if isinstance(value, str):
        return value
    if type(value).__module__ == "torch":
        name = str(value).removeprefix("torch.")
    elif isinstance(value, type):
        # Python's own `float` has 64 bits, and SGLang's name "float" means 32.
        name = value if value.__module__ == "builtins" else value.__name__
    else:
        name = getattr(value, "name", value)
    return DTYPE_SPELLINGS.get(name, name) if isinstance(name, str) else value
