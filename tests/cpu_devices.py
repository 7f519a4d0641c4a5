"""Programs in processes of their own, with several devices made of a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def on_cpu_devices(count: int, *arguments: str) -> str:
    """What Python prints with these arguments, from the repository's root; it must succeed."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
