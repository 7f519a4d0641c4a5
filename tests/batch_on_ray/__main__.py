"""`python -m tests.batch_on_ray [NAME ...]`: runs these checks, or all; `make batch-on-ray`.

    crashes     5,000 rows on two Ray nodes, two actors killed, the driver killed once
    placement   which GPUs the actors get, on a machine without any
    sources     Ray Datasets, Parquet, errors of actors
    pace        two actors beside two plain processes with the same rows, a core each

The environment is .cache/batch_on_ray, made the first time, which needs PyPI; the checks do not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from tests.clients.environments import ROOT, environment

PACKAGES = ("ray[data]==2.60.0",)
CHECKS = ("crashes", "placement", "sources", "pace")
SECONDS = 1800
"""For a check; on a free machine each takes a minute or two."""
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),  # of Ray's workers too
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # as plain processes have; 15 by default
}


def main(names: list[str]) -> int:
    unknown = set(names) - set(CHECKS)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
        return 2
    python = environment(ROOT / ".cache" / "batch_on_ray", PACKAGES, extra="[ray]")
    passed = {}
    for name in names or CHECKS:
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as scratch:
            command = [str(python), "-m", f"tests.batch_on_ray.check_{name}", scratch]
            done = subprocess.run(
                command, env=os.environ | ENVIRONMENT, cwd=ROOT, timeout=SECONDS, check=False
            )
        passed[name] = done.returncode == 0
    print("\n".join(f"{name}: {'passed' if right else 'FAILED'}" for name, right in passed.items()))
    return not all(passed.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
