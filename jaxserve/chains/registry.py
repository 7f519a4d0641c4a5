"""What an engine's requests can name: registered chains, or hooks. No jax."""

from __future__ import annotations

from jaxserve import checks
from jaxserve.chains.use import ChainUse, Registered
from jaxserve.errors import InvalidRequestError
from jaxserve.sampling_params import SamplingParams


class Names:
    """Of one kind. Thread-safe: a name is published when everything that its requests need is
    there."""

    def __init__(self, kind: str, method: str) -> None:
        """kind: the sampling parameter that names one, beside which `<kind>_params` is. method:
        with which they are registered."""
        self._kind, self._params, self._method = kind, f"{kind}_params", method
        self._by_name: dict[str, Registered] = {}

    def publish(self, name: str, found: Registered) -> None:
        """Let requests use it; those that have begun keep what `name` was before."""
        self._by_name[name] = found

    def withdraw(self, name: str) -> None:
        """Let no further request use it; those that have begun keep it. InvalidRequestError: there
        is none of this name."""
        if self._by_name.pop(name, None) is None:
            raise self._unknown("name", name)

    def use(self, params: SamplingParams) -> ChainUse | None:
        """What a request with `params` has of this kind; None without one. InvalidRequestError: the
        name is not registered, or the parameters are not those that it was registered with."""
        name, given = getattr(params, self._kind), getattr(params, self._params)
        if name is None:
            if given:
                raise InvalidRequestError(
                    f"{self._params} needs {self._kind}=..., a name of {self._method}, got "
                    f"{self._params}={checks.shown(given)}"
                )
            return None
        found = self._by_name.get(name)
        if found is None:
            raise self._unknown(self._kind, name)
        return ChainUse(found, *found.spec.pack(given or {}, self._params))

    def _unknown(self, parameter: str, name: str) -> InvalidRequestError:
        known = sorted(self._by_name)
        there = f"registered are {', '.join(map(repr, known))}" if known else "none is"
        return InvalidRequestError(
            f"{parameter}={checks.quoted(name)} is not registered ({self._method})"
            f"{checks.near_matches(name, known)}; {there}"
        )
