"""Measurements in processes of their own, which print JSON and are ended if they take too long."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Child(NamedTuple):
    """What became of a process."""

    lines: list[dict[str, Any]]
    """The JSON objects that it printed, a line each, as far as it came."""
    errors: str
    """All that it wrote to stderr."""
    failed: str
    """Why it did not end well; "" if it did."""


def run(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> Child:
    """`command`, for `seconds` at most. environment: the whole; None is this process's."""
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
        output, errors = done.stdout, done.stderr
        failed = f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        output, errors = ((text or b"").decode() for text in (late.stdout, late.stderr))
        failed = f"ended after {seconds:g} s"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return Child(lines, errors, failed)
