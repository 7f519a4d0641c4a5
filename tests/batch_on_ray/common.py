"""What the checks of batch jobs on Ray have in common."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.checkpoints import make_checkpoint

SAMPLING = {"temperature": 0.0, "max_new_tokens": 8}
OPTIONS = {"context_length": 256, "max_total_tokens": 16384, "max_running_requests": 64}
STORE = 100 << 20
"""Bytes of a node's object store; nothing large goes through it."""


def model(scratch: str) -> str:
    """A tiny checkpoint."""
    return make_checkpoint(f"{scratch}/model", "llama")


def cluster(scratch: str, nodes: int, **each: float) -> Cluster:
    """Several Ray nodes on this machine. each: the resources that a node says it has."""
    found = Cluster()
    for _ in range(nodes):
        found.add_node(object_store_memory=STORE, include_dashboard=False, **each)
    return found


def prompt(number: int) -> str:
    return f"The number {number} is"


def output(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL job, in order."""
    return [
        json.loads(line)
        for path in sorted(Path(folder).glob("part-*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
