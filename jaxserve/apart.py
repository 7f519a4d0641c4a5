"""What any thread may do about requests whose tokens are drawn apart (`Request.apart`), and about
laboratories."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jaxserve import checks

if TYPE_CHECKING:
    from jaxserve.chains.use import Registered
    from jaxserve.guides.guide import Guide
    from jaxserve.lab.lab import Lab
    from jaxserve.loop import EngineLoop

T = TypeVar("T")


class Apart:
    """Of all loops of an engine."""

    def __init__(self, loops: Sequence[EngineLoop]) -> None:
        self._loops = loops

    def register(
        self, name: str, transform: Any, params: Any, tables: Any, fuse: bool
    ) -> Registered:
        """Compile a chain of transforms (`Engine.register`) on the calling thread, for every loop
        or none; the first one compiles, and the others find what it has stored.
        InvalidRequestError: it cannot be; EngineDeadError, EngineShutdownError."""
        chains = [loop.chains.build(name, transform, params, tables, fuse) for loop in self._loops]
        self._wait(lambda loop, chain: loop.chains.adopt(chain), chains)
        return chains[0].registered._replace(fused=fuse)

    def register_hook(self, name: str, points: Any, params: Any, tables: Any) -> Registered:
        """The same of a hook (`Engine.register_hook`)."""
        built = []
        for loop in self._loops:
            built.append(loop.chains.hooks.build(name, points, params, tables))
            loop.chains.build_shared()
        self._wait(lambda loop, each: loop.chains.hooks.adopt(each), built)
        return built[0].hook.registered

    def _wait(self, adopt: Callable[[EngineLoop, T], None], built: Sequence[T]) -> None:
        """Until the thread of each loop has adopted what was built for it."""
        pairs = zip(self._loops, built, strict=True)
        asked = [loop.ask(functools.partial(adopt, loop, each)) for loop, each in pairs]
        for future in asked:
            future.result()

    def lab(self, max_tokens: int, replica: int) -> Lab:
        """See `Engine.lab`."""
        replica = checks.integer("replica", replica, 0, len(self._loops) - 1)
        return self._loops[replica].bench.open(max_tokens)

    def prepare(self, guides: Iterable[Guide]) -> None:
        """Compile what `guides` need, on the calling thread, if it is not there."""
        edits = any(guide.edits for guide in guides)
        for loop in self._loops:
            loop.chains.build_shared(edits)
