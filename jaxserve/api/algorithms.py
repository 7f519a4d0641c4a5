"""The methods of an engine for those who bring a decoding algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxserve import checks
from jaxserve.chains.registry import Names
from jaxserve.process import Home

if TYPE_CHECKING:
    from jaxserve.core import Core
    from jaxserve.lab.lab import Lab
    from jaxserve.transforms import Transform


class Algorithms:
    """A part of `Engine`."""

    _home: Home
    _loop: Core
    _chains: Names
    _hooks: Names

    def register(
        self,
        name: str,
        transform: Transform,
        params: Mapping[str, Any] | None = None,
        tables: Mapping[str, Any] | None = None,
        fuse: bool = False,
    ) -> None:
        """Compiles a transform of logits (`jaxserve.transforms`) into programs that draw tokens,
        for requests with `{"transform": name, "transform_params": {...}}`. Other requests go on
        meanwhile; with the first transform the model is compiled once more, up to the logits.

        params: {name: number or array}, over the transform's own defaults; a request may give each
        its own value. tables: {name: array} of any size, the same for all requests, read as
        `context.tables[name]`. A name that is registered again means the new transform from the
        next request on.

        fuse: compile it into decode steps, too, of one and of `num_continuous_decode_steps` tokens
        a dispatch, which batches run whose only chain it is and in which no row has a hook, a
        grammar or a processor. For small models, whose steps take no longer than a dispatch: each
        such program takes as long to compile as one of the model's. Not in deterministic mode.

        Raises InvalidRequestError (the cause is what a function has raised), EngineShutdownError
        and EngineDeadError.
        """
        self._home.check()
        name, fuse = checks.name("name", name), checks.boolean("fuse", fuse)
        found = self._loop.apart.register(name, transform, params, tables, fuse)
        self._chains.publish(name, found)

    def unregister(self, name: str) -> None:
        """No further request can ask for the transform `name`; those that have been submitted keep
        it. Its programs and tables stay as long as the engine, so that it can be registered again
        at once.

        Raises InvalidRequestError: none of this name is registered.
        """
        self._home.check()
        self._chains.withdraw(checks.name("name", name))

    def unregister_hook(self, name: str) -> None:
        """The same of the hook `name`."""
        self._home.check()
        self._hooks.withdraw(checks.name("name", name))

    def register_hook(
        self,
        name: str,
        points: Mapping[str, Callable[..., Any]],
        params: Mapping[str, Any] | None = None,
        tables: Mapping[str, Any] | None = None,
    ) -> None:
        """Compiles functions into the model, for requests with `{"hook": name, "hook_params":
        {...}}`; for others it stays as it is. Their cached prefixes are shared only with requests
        of the same functions and parameters. The whole model is compiled once more.

        points: {point: function(x [D], params, context) -> x [D]} of one token, [N * H] of heads
        (`jaxserve.hooks.POINTS`, `HookContext`). params, tables: as in `register`. Raises as that.
        """
        self._home.check()
        name = checks.name("name", name)
        self._hooks.publish(name, self._loop.apart.register_hook(name, points, params, tables))

    def lab(self, max_tokens: int, *, replica: int = 0) -> Lab:
        """Prefixes as values, for search and other algorithms that are no `generate`: prefill,
        fork, step, extend, truncate, with logits and hidden states as arrays on the device, beside
        the requests that the engine serves (docs/guide/lab.md).

        max_tokens: whose keys and values fit at once; their pages are taken from the pool until the
        laboratory is closed. replica: of several (`dp_size`), the number of the one that runs it.
        The first one compiles three kinds of programs.

        Raises InvalidRequestError, OutOfPagesError, EngineShutdownError and EngineDeadError.
        """
        self._home.check()
        return self._loop.apart.lab(max_tokens, replica)
