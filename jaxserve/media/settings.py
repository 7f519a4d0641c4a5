"""What a model's files say of its images: values by key, checked as they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, ModelLoadError

LARGEST = 1 << 20
"""Of sizes in pixels, counts and ids; areas may be larger."""


class Settings:
    """A JSON object. The accessors raise ModelLoadError, naming file and key, for another type or
    range, and for a missing value (null included) unless there is a default."""

    def __init__(self, where: str, values: Any) -> None:
        """where: the file, and the keys that lead to the object."""
        if not isinstance(values, Mapping):
            raise ModelLoadError(f"{where} must be an object, got {checks.shown(values)}")
        self.where = where
        self._values = values

    def integer(
        self, *keys: str, default: int | None = None, low: int = 1, high: int = LARGEST
    ) -> int:
        """Of the first of `keys` (spellings of one) that is there."""
        key, value = self._first(keys, default)
        return self._checked(key, checks.integer, value, low, high)

    def number(self, key: str, default: float, above: float) -> float:
        """A finite float greater than `above`."""
        _, value = self._first((key,), default)
        return self._checked(key, lambda name, x: checks.number(name, x, above, above=True), value)

    def flag(self, key: str, default: bool) -> bool:
        _, value = self._first((key,), default)
        return self._checked(key, checks.boolean, value)

    def channels(
        self, key: str, default: tuple[float, ...], above: float | None = None
    ) -> tuple[float, ...]:
        """A number for each of three channels; one is for all of them. above: what they exceed."""
        _, value = self._first((key,), list(default))
        values = list(value) if isinstance(value, list | tuple) else [value] * 3
        if len(values) != 3:
            raise ModelLoadError(
                f"{self.where}: {key} must have 3 numbers, got {checks.shown(value)}"
            )

        def number(name: str, item: Any) -> float:
            return checks.number(name, item, above, above=above is not None)

        return tuple(self._checked(key, number, item) for item in values)

    def integers(self, key: str) -> list[int]:
        """A list of them; empty where there is none."""
        _, value = self._first((key,), [])
        if not isinstance(value, list | tuple):
            raise ModelLoadError(f"{self.where}: {key} must be a list, got {checks.shown(value)}")
        return [self._checked(key, checks.integer, item, 0, LARGEST) for item in value]

    def within(self, key: str) -> Settings:
        """The object under `key`; an empty one where there is none."""
        value = self._values.get(key)
        return Settings(f"{self.where}: {key}", {} if value is None else value)

    def given(self, key: str) -> Any:
        """As it is; None where it is missing."""
        return self._values.get(key)

    def _first(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for key in keys:
            if self._values.get(key) is not None:
                return key, self._values[key]
        if default is None:
            raise ModelLoadError(f"{self.where}: {keys[0]} is missing")
        return keys[0], default

    def _checked(self, key: str, check: Any, *arguments: Any) -> Any:
        try:
            return check(f"{self.where}: {key}", *arguments)
        except InvalidRequestError as error:
            raise ModelLoadError(str(error)) from None


def processor_settings(
    files: Mapping[str, Any] | None, overrides: Mapping[str, Any], known: tuple[str, ...]
) -> Settings:
    """What an image processor goes by: preprocessor_config.json, or the object `image_processor`
    of processor_config.json, with the overrides of `mm_process_config` over it.

    known: the arguments that the family's processor has. Raises ModelLoadError, and
    InvalidRequestError for overrides of other names.
    """
    for name in overrides:
        if name not in known:
            raise InvalidRequestError(
                f"mm_process_config['image'] has the key {checks.shown(name)}, which this model's "
                f"image processor does not know{checks.near_matches(name, known)}; it knows "
                f"{', '.join(known)}"
            )
    where = "preprocessor_config.json"
    if overrides:
        where = f"{where} with mm_process_config={{'image': {checks.quoted(dict(overrides))}}}"
    values = Settings(where, files or {})
    nested = values.given("image_processor")
    if nested is not None:
        values = Settings(where, nested)
    return Settings(where, {**values._values, **overrides})
