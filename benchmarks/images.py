"""What images cost: a model with a vision tower and random weights.

    python -m benchmarks.images --model qwen2.5-vl-7b --out result.json
    python -m benchmarks.images --model tiny-vl --size 64 --requests 4 --repeats 1 --new 8 \\
        --engine '{"max_running_requests": 4}'

Reported, medians of several turns, each with images of its own, which nothing has seen before:
"throughput", requests of one square PIL image, some tokens of text and some new ones, all given to
one call: images/s and the share of the floor (the tower and the prefill at the rate of a matrix
product, decode steps at the bandwidth of a copy, both measured); "first_token" of one such request
alone, its image's resizing included; "encode", the tower's program of one image, beside its floor;
"gap_ms", between the tokens of running streams while as many such requests come in at once;
"text", the seconds of a call without images, beside the same decoder as a text model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from benchmarks import machine, workloads
from benchmarks.engine import Counts, differences, dummy_engine, generate
from benchmarks.interference import STREAM_PROMPT, beside_streams, gaps, percentile
from jaxserve.media.picture import Picture
from jaxserve.packing.media import Encoding

GREEDY = {"temperature": 0, "ignore_eos": True}
LATENCY_REPEATS = 5


class Shown(NamedTuple):
    """Requests of one image each."""

    ids: list[list[int]]
    images: list[Image.Image]


class Prompts:
    """Makes requests that share nothing with those before."""

    def __init__(self, model: str, size: int, text: int) -> None:
        """size: pixels of an image's side. text: tokens beside an image."""
        self._vocab = workloads.SHAPES[workloads.decoder(model)]["vocab_size"]
        self._size, self._text = size, text
        self._draw, self._pixels = random.Random(model), np.random.default_rng(0)

    def make(self, count: int) -> Shown:
        """The images are noise, so that a resize has no easy ones."""
        shape = (self._size, self._size, 3)
        noise = [self._pixels.integers(0, 256, shape, np.uint8) for _ in range(count)]
        texts = [workloads.random_ids(self._draw, self._vocab, self._text) for _ in range(count)]
        ids = [[workloads.IMAGE_TOKEN, *text] for text in texts]
        return Shown(ids, [Image.fromarray(each) for each in noise])


def call(shown: Shown, new: int) -> dict[str, Any]:
    """The arguments of `generate`."""
    params = {**GREEDY, "max_new_tokens": new}
    images = [[image] for image in shown.images]
    return {"input_ids": shown.ids, "image_data": images, "sampling_params": params}


def timed(engine: Any, shown: Shown, new: int) -> tuple[float, int]:
    """Seconds of one call, and the tokens of one prompt."""
    started = time.perf_counter()
    results = engine.generate(**call(shown, new))
    seconds = time.perf_counter() - started
    assert [len(result["output_ids"]) for result in results] == [new] * len(shown.ids)
    return seconds, results[0]["meta_info"]["prompt_tokens"]


async def arrive(engine: Any, shown: Shown) -> tuple[float, float]:
    """When requests were submitted, and when the first token of all had come."""
    submitted = time.perf_counter()
    await engine.async_generate(**call(shown, 1))
    return submitted, time.perf_counter()


def picture_of(engine: Any, image: Image.Image) -> Picture:
    """As the engine reads it."""
    [(_, media)] = engine._prompts._reader.read([[workloads.IMAGE_TOKEN]], [[image]], False)
    [picture] = media.pictures
    return picture


def encode_seconds(engine: Any, picture: Picture, repeats: int) -> float:
    """Of the tower's program for one picture, which lies on the device already."""
    runner = engine._loop._runner
    rows = np.arange(picture.tokens, dtype=np.int32)
    queued = runner.pictures.prepare([Encoding(picture, rows)])
    queued = [each._replace(given=jax.device_put(each.given)) for each in queued]

    def measured() -> float:
        def run() -> None:
            runner.pictures.queue(queued)
            runner._arrays["media"].block_until_ready()

        run()
        return machine.median_seconds(run, repeats)

    seconds = engine._loop.call(measured)
    assert engine.flush_cache().success  # rows of the buffer have been written over
    return seconds


def tower_flops(vision: Mapping[str, Any], patches: int) -> int:
    """The least that `patches` of one picture need: its products, and the scores of whole pictures
    in some layers and of windows in the others."""
    dim, layers = vision["hidden_size"], vision["depth"]
    merge, whole = vision["spatial_merge_size"] ** 2, len(vision["fullatt_block_indexes"])
    window = (vision["window_size"] // vision["patch_size"]) ** 2
    weights = layers * (4 * dim**2 + 3 * dim * vision["intermediate_size"])
    weights += 3 * vision["patch_size"] ** 2 * dim
    merger = merge * dim * (merge * dim + vision["out_hidden_size"])
    pairs = patches * (whole * patches + (layers - whole) * min(window, patches))
    return 2 * (weights * patches + merger * (patches // merge)) + 4 * dim * pairs


def with_images(
    engine: Any, prompts: Prompts, count: int, new: int, repeats: int
) -> tuple[dict[str, Any], Picture, int]:
    """Figures of requests with images, an image as the engine reads it, and a prompt's tokens."""
    timed(engine, prompts.make(count), new)
    before = engine.get_server_info()
    turns = [timed(engine, prompts.make(count), new) for _ in range(repeats)]
    tokens = turns[0][1]
    seconds = [round(each, 4) for each, _ in turns]
    alone = [timed(engine, prompts.make(1), 1)[0] for _ in range(LATENCY_REPEATS)]
    counted = differences(before, engine.get_server_info(), Counts())
    picture = picture_of(engine, prompts.make(1).images[0])
    facts = {
        "prompt_tokens": tokens,
        "seconds": seconds,
        "images_per_s": round(count / statistics.median(seconds), 3),
        "first_token_ms": round(1e3 * statistics.median(alone), 2),
        "encode_ms": round(1e3 * encode_seconds(engine, picture, LATENCY_REPEATS), 3),
        **counted,
    }
    return facts, picture, tokens


def waits(
    engine: Any, text_model: str, prompts: Prompts, count: int, streams: int, repeats: int
) -> dict[str, Any]:
    """Gaps of streams while `count` requests with images come in at once, several times."""
    longest = engine.server_args.context_length - STREAM_PROMPT - 1

    def run(turns: int) -> tuple[list[tuple[float, float]], list[list[float]]]:
        bursts = [prompts.make(count) for _ in range(turns)]
        return asyncio.run(beside_streams(engine, text_model, bursts, streams, longest, arrive))

    run(1)
    spans, times = run(repeats)
    found = [gap for span in spans for stream in times for gap in gaps(stream, *span)]
    calm = [gap for stream in times for gap in gaps(stream, stream[0], spans[0][0])]
    shares = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    return {
        "streams": streams,
        "gap_ms": {name: round(1e3 * percentile(found, share), 2) for name, share in shares},
        "undisturbed_gap_ms": round(1e3 * percentile(calm, 0.5), 2),
        "images_in_s": round(statistics.median(b - a for a, b in spans), 4),
    }


def text_seconds(engine: Any, text_model: str, scale: float, repeats: int) -> list[float]:
    """Of calls without images; the first one warms up."""
    vocab = workloads.SHAPES[text_model]["vocab_size"]
    lists = [workloads.requests("uniform", vocab, seed, scale) for seed in range(repeats + 1)]
    found = [generate(engine, items, {"temperature": 0}) for items in lists]
    return [round(seconds, 4) for seconds in found[1:]]


def run(given: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    model, count, new, repeats = given.model, given.requests, given.new, given.repeats
    text_model, vision, _ = workloads.TOWERS[model]
    options = {
        "context_length": 4096,
        "max_running_requests": count,
        "limit_mm_data_per_request": {"image": 1},
        "stream_output": True,
        **given.engine,
    }
    with dummy_engine(model, options) as (engine, startup):
        description = machine.describe()
        prompts = Prompts(model, given.size, given.text)
        facts, picture, tokens = with_images(engine, prompts, count, new, repeats)
        streams = max(count // 2, 1)
        beside = waits(engine, text_model, prompts, count - streams or 1, streams, repeats)
        seen = text_seconds(engine, text_model, given.scale, repeats)
    text_options = {k: v for k, v in options.items() if k != "limit_mm_data_per_request"}
    with dummy_engine(text_model, text_options) as (engine, _):
        alone = text_seconds(engine, text_model, given.scale, repeats)
    ceilings = machine.Ceilings.measure()
    patches = picture.shape.patches if picture.shape else 0
    tower = tower_flops(vision, patches) / ceilings.rate
    floor = machine.Floor.of(workloads.SHAPES[text_model], options)
    work = floor.work([([-index, *[0] * (tokens - 1)], new) for index in range(count)], count)
    least = count * tower + work.seconds(ceilings)
    return {
        **description,
        "benchmark": "images",
        "model": model,
        "engine": options,
        "requests": count,
        "size": given.size,
        "new_tokens": new,
        "patches": patches,
        "image_tokens": picture.tokens,
        "startup_seconds": round(startup, 2),
        "throughput": facts,
        "floor_images_per_s": round(count / least, 3),
        "share_of_floor": round(least / statistics.median(facts["seconds"]), 4),
        "encode_floor_ms": round(1e3 * tower, 3),
        "encode_share_of_floor": round(1e3 * tower / facts["encode_ms"], 4),
        "beside_streams": beside,
        "text": {
            "seconds": seen,
            "text_model_seconds": alone,
            "throughput_ratio": round(statistics.median(alone) / statistics.median(seen), 4),
        },
        "copy_gb_per_s": round(ceilings.bandwidth / 1e9, 1),
        "matmul_tflop_per_s": round(ceilings.rate / 1e12, 2),
    }


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-vl-7b", choices=sorted(workloads.TOWERS))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--size", type=int, default=1024, help="pixels of an image's side")
    parser.add_argument("--text", type=int, default=64, help="tokens beside an image")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=0.25, help="share of uniform's 256 requests")
    parser.add_argument("--engine", type=json.loads, default={}, help="further options, JSON")
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    given = parser().parse_args()
    result = run(given)
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
