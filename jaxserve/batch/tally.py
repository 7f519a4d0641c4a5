"""Counts of a job, and what they come to: tokens a second, money a million tokens."""

from __future__ import annotations

import dataclasses

MILLION = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """Of some rows."""

    rows: int = 0
    """All of them."""
    failed: int = 0
    """Those with an error instead of an answer."""
    prompt_tokens: int = 0
    """Of the answered rows' prompts."""
    completion_tokens: int = 0
    """Generated."""
    cached_tokens: int = 0
    """Of the prompts, from the prefix cache."""
    started: float = 0.0
    """When the first of them was read, in seconds since the epoch; 0 where it is not known."""
    ended: float = 0.0
    """When the last of them was written."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            rows=self.rows + other.rows,
            failed=self.failed + other.failed,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            started=min(filter(None, (self.started, other.started)), default=0.0),
            ended=max(self.ended, other.ended),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What `run` returns. `str(report)` is what the command line prints."""

    total: Tally
    """Of the whole job, earlier runs included."""
    now: Tally
    """Of this run: all zeros where nothing was left to do."""
    output: str
    """The folder."""
    runner: str
    """"local", "ray", or "none" where nothing was left to do."""
    seconds: float = 0.0
    """This run, from reading the input to the last part, engines' starts included."""
    cost_per_hour: float | None = None
    """Of all machines together, as given."""

    @property
    def generating_seconds(self) -> float:
        """From the first row read by an engine to the last part written: `seconds` without the
        first engine's start."""
        return self.now.ended - self.now.started

    @property
    def cost(self) -> float | None:
        """Of `seconds`, in the currency of cost_per_hour; None without it."""
        return None if self.cost_per_hour is None else self.seconds / 3600 * self.cost_per_hour

    def __str__(self) -> str:
        total = self.total
        lines = [
            f"{total.rows:,} rows in {self.output}, {total.failed:,} of them failed; "
            f"{total.prompt_tokens:,} prompt tokens ({total.cached_tokens:,} cached), "
            f"{total.completion_tokens:,} output tokens"
        ]
        now = self.now
        if not now.rows:
            lines.append("nothing was left to do")
            return "\n".join(lines)
        span = max(self.generating_seconds, 1e-9)
        lines.append(
            f"this run ({self.runner}): {now.rows:,} rows in {self.seconds:.1f} s, "
            f"{self.generating_seconds:.1f} s of them generating: {now.rows / span:,.1f} rows/s, "
            f"{now.prompt_tokens / span:,.0f} prompt and {now.completion_tokens / span:,.0f} "
            "output tokens/s"
        )
        if self.cost is not None:
            lines.append(f"cost: {self.cost:.4f}{self._shares(self.cost)}")
        return "\n".join(lines)

    def _shares(self, cost: float) -> str:
        shares = {
            "output tokens": self.now.completion_tokens,
            "tokens, prompts included": self.now.completion_tokens + self.now.prompt_tokens,
        }
        return "".join(
            f", {cost / tokens * MILLION:.4f} a million {name}"
            for name, tokens in shares.items()
            if tokens
        )
