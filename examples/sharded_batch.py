"""One batch over all devices: a mesh goes in, and each of its rows answers a share of the prompts.

    python examples/sharded_batch.py [--model PATH] [--tensor 2] [--prompts 64]

On a machine without GPUs, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight devices.
"""

from __future__ import annotations

import argparse
import collections

import jax
import numpy as np
from demo_model import fetch

import jaxserve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="checkpoint folder, .gguf file or hub id")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share a copy's layers")
    parser.add_argument("--prompts", type=int, default=64)
    given = parser.parse_args()

    devices = np.array(jax.devices()).reshape(-1, given.tensor)
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"))
    prompts = [f"The number {number} is" for number in range(given.prompts)]
    with jaxserve.Engine(model_path=given.model or str(fetch()), mesh=mesh) as engine:
        results = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 8})

    for prompt, result in zip(prompts[:3], results, strict=False):
        print(repr(prompt + result["text"]))
    shares = collections.Counter(result["meta_info"]["dp_rank"] for result in results)
    by_row = [shares[row] for row in range(len(devices))]
    print(f"{len(results)} answers, by the rows of the mesh: {by_row}")


if __name__ == "__main__":
    main()
