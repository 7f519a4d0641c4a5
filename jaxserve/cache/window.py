"""Pages of models in which every layer sees the last tokens only. Host only, no jax."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """What a token at position p sees: positions p - tokens < k <= p."""

    tokens: int
    """The current one included."""
    page_size: int
    """S."""

    @classmethod
    def fitting(
        cls, tokens: int | None, page_size: int, num_pages: int, chunk: int = 1
    ) -> Window | None:
        """The window of a model (None: a layer sees everything); None also where a pool of
        `num_pages` has no ring for `chunk` tokens at a time: there no page is given back early."""
        if tokens is None:
            return None
        window = cls(tokens, page_size)
        return window if window.ring(chunk) <= num_pages else None

    def passed(self, kv_len: int) -> int:
        """Leading pages of a sequence that its token at position `kv_len`, and later ones, do not
        see."""
        return max(kv_len - self.tokens + 1, 0) // self.page_size

    def ring(self, chunk: int) -> int:
        """Pages with which a sequence of any length runs: at least `chunk` tokens at a time, if
        those passed are taken again each time."""
        return -(-(self.tokens - 1 + chunk) // self.page_size) + 1
