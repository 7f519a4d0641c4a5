"""The benchmarks' workloads, protocol, floors and report, on the host; a tiny engine in the slow
ones."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as xml
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from benchmarks import (
    engine,
    figures,
    grammars,
    hidden_states,
    host_overhead,
    images,
    interference,
    latency,
    machine,
    offline_throughput,
    outputs,
    profile,
    report,
    runs,
    startup,
    suite,
    tables,
    workloads,
)
from jaxserve.models import registry

LLAMA_VOCAB = 128256

# -- workloads ------------------------------------------------------------------------------------

# case: requests, prompt tokens, output tokens, first three ids of the first prompt, last id of the
# last, with seed 2 and Llama's vocabulary; recorded from the lists that vLLM was measured with
# ("long" is ours).
FACTS = {
    "uniform": (256, 131072, 65536, [65460, 65226, 9277], 84730),
    "uniform_s": (256, 131072, 65536, [55923, 6632, 126937], 1872),
    "ragged": (512, 261507, 134966, [85249, 87467, 102287], 95780),
    "ragged_s": (512, 261507, 134966, [98116, 79295, 17723], 111279),
    "prefix": (256, 270336, 16384, [46570, 68981, 42463], 104189),
    "long": (64, 524288, 8192, [124201, 125800, 63596], 79372),
    "lat1": (1, 128, 256, [15418, 102565, 79823], 7921),
    "lat1_s": (1, 128, 256, [27174, 8966, 23708], 85793),
    "lat8": (8, 1024, 2048, [46661, 9592, 81256], 112897),
}

PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "qwen2.5-7b": 7_615_616_512,
    "gemma-3-4b": 3_880_263_168,
    "phi-3-mini": 3_821_079_552,
    "olmo-2-7b": 7_298_617_344,
}
"""Of the real models, embeddings counted once where they are tied."""


@pytest.mark.parametrize("case", FACTS)
def test_request_lists_are_those_of_the_peers_figures(case):
    count, prompt_tokens, output_tokens, first, last = FACTS[case]
    items = workloads.requests(case, LLAMA_VOCAB, seed=2)
    assert len(items) == count
    assert sum(len(ids) for ids, _ in items) == prompt_tokens
    assert sum(out for _, out in items) == output_tokens
    assert (items[0][0][:3], items[-1][0][-1]) == (first, last)
    assert all(10 <= t < LLAMA_VOCAB - 300 for ids, _ in items for t in ids)


def test_every_case_has_facts():
    assert set(FACTS) == set(workloads.CASES)
    assert {*latency.BENCHMARK.cases, *offline_throughput.BENCHMARK.cases} == set(FACTS)


@pytest.mark.parametrize("case, seed", [("ragged_s", 1), ("prefix", 0), ("uniform", 3)])
def test_request_lists_derived_anew(case, seed):
    vocab, numbers, lengths = 1000, random.Random(f"{case}/{seed}"), random.Random(7)
    shapes = {
        "ragged_s": [(lengths.randint(32, 1024), lengths.randint(32, 512)) for _ in range(512)],
        "prefix": [(32, 64)] * 256,
        "uniform": [(512, 256)] * 256,
    }
    shared = [numbers.randrange(10, vocab - 300) for _ in range(1024 * (case == "prefix"))]
    expected = []
    for prompt, output in shapes[case]:
        own = []
        while len(own) < prompt:
            own.append(numbers.randrange(10, vocab - 300))
        expected.append((shared + own, output))
    assert workloads.requests(case, vocab, seed) == expected


def test_seeds_and_cases_share_no_prefix_and_ragged_keeps_its_lengths():
    lists = [
        workloads.requests(case, LLAMA_VOCAB, seed, scale=0.01)
        for case in ("uniform", "uniform_s", "ragged", "ragged_s", "prefix", "lat1", "lat1_s")
        for seed in (1, 2, 3)
    ]
    starts = {tuple(items[0][0][:4]) for items in lists}
    assert len(starts) == len(lists)
    ragged = [workloads.requests("ragged", 1000, seed) for seed in (1, 2)]
    lengths = [[(len(ids), out) for ids, out in items] for items in ragged]
    assert lengths[0] == lengths[1]


def test_scale_keeps_the_first_requests_and_at_least_one():
    whole = workloads.requests("ragged", 1000)
    assert workloads.requests("ragged", 1000, scale=0.25) == whole[:128]
    assert workloads.requests("ragged", 1000, scale=1e-6) == whole[:1]
    assert len(workloads.requests("lat8", 1000, scale=0.25)) == 8


@pytest.mark.parametrize("case", ["lat2", "unifrom", "long_prefix", ""])
def test_unknown_cases(case):
    with pytest.raises(ValueError, match="unknown case"):
        workloads.requests(case, 1000)


def test_sampled_cases():
    assert workloads.sampling("ragged_s") == {"temperature": 0.8, "top_p": 0.95}
    assert workloads.sampling("ragged") == {"temperature": 0}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_real_models_parameters(name):
    config = registry.config_from_hf(workloads.SHAPES[name] | {"dtype": "bfloat16"})
    specs = registry.declare(config, jnp.bfloat16).specs
    assert sum(math.prod(spec.shape) for spec in specs.values()) == PARAMETERS[name]


def test_the_tower_has_the_real_models_parameters_and_products():
    """The kernels of a video's two frames are added before the product, and the MLPs, of 3,420, are
    padded to 3,456."""
    hf = workloads.with_tower("qwen2.5-vl-7b") | {"dtype": "bfloat16"}
    decoder = registry.config_from_hf(hf)
    specs = registry.declare_tower(registry.tower_config_from_hf(hf, decoder), jnp.bfloat16).specs
    sizes = {
        name: math.prod(3420 * size // 3456 if size % 3456 == 0 else size for size in spec.shape)
        for name, spec in specs.items()
    }
    assert sum(sizes.values()) == 8_292_166_656 - PARAMETERS["qwen2.5-7b"]
    patches = 74 * 74
    merged = {name for name in sizes if name.startswith("merger")}
    products = sum(
        2 * sizes[name] * (patches // 4 if name in merged else patches)
        for name, spec in specs.items()
        if len(spec.shape) > 1
    )
    products -= 2 * patches * 3 * 14 * 14 * 1280
    scores = 4 * 1280 * (4 * patches**2 + 28 * 64 * patches)
    assert images.tower_flops(hf["vision_config"], patches) == products + scores


def test_the_long_case_stretches_the_context(tmp_path):
    def written(*arguments):
        folder = workloads.write_model("llama-3.1-8b", tmp_path, *arguments)
        return json.loads((folder / "config.json").read_text())

    assert written()["max_position_embeddings"] == 8192
    assert written(["uniform", "long"])["max_position_embeddings"] == 8192 + 128
    assert workloads.context_length("qwen3-8b", ["long"]) == 40960
    longest = {
        case: max(len(ids) + out for ids, out in workloads.requests(case, 1000))
        for case in workloads.CASES
    }
    for case, tokens in longest.items():
        assert tokens <= workloads.context_length("llama-3.1-8b", [case])


# -- protocol -------------------------------------------------------------------------------------


class PretendedEngine:
    """10 ms to the first token and 2 ms for each later one by a clock of its own."""

    def __init__(self, monkeypatch, late=0):
        self.calls: list[tuple[list[list[int]], list[dict]]] = []
        self.flushes, self.late, self.now = 0, late, 100.0
        monkeypatch.setattr(engine.time, "perf_counter", lambda: self.now)

    def generate(self, input_ids, sampling_params):
        self.calls.append((input_ids, sampling_params))
        lengths = [params["max_new_tokens"] for params in sampling_params]
        self.now += 0.010 + 0.002 * (max(lengths) - 1)
        meta = {"num_retractions": 1, "cached_tokens": 2}
        return [{"output_ids": [5] * length, "meta_info": meta} for length in lengths]

    def flush_cache(self):
        self.flushes += 1
        return SimpleNamespace(success=True)

    def get_server_info(self):
        done = len(self.calls)
        return {
            "extend_steps": done, "decode_steps": 9 * done, "late_compiles": self.late * done,
            "host_seconds": {"schedule": 0.01 * done, "commit": 0.03 * done}, "programs": 7,
            "memory_usage": {"weight": 1.23456}, "max_running_requests": 64,
        }  # fmt: skip


def test_throughput_protocol(monkeypatch):
    pretended = PretendedEngine(monkeypatch)
    case = runs.Case("tiny", "ragged_s", repeats=3)
    measured = offline_throughput.measure(pretended, case)
    lists = [workloads.requests("ragged_s", 1000, seed) for seed in (1, 2, 3, 4)]
    assert [ids for ids, _ in pretended.calls] == [
        [ids for ids, _ in items] for items in (lists[0][:128], *lists[1:])
    ]
    warm, *timed = [params for _, params in pretended.calls]
    assert [p["max_new_tokens"] for p in warm] == [min(out, 64) for _, out in lists[0][:128]]
    for params in timed:
        assert [p["max_new_tokens"] for p in params] == [out for _, out in lists[1]]
    assert all(
        p["ignore_eos"] and p["temperature"] == 0.8 and p["top_p"] == 0.95
        for params in (warm, *timed) for p in params
    )  # fmt: skip
    seconds = 0.010 + 0.002 * (max(out for _, out in lists[1]) - 1)
    facts = measured.facts
    assert measured.seconds == pytest.approx(seconds)
    assert facts["seconds"] == pytest.approx([seconds] * 3, abs=1e-3)
    assert facts["output_tokens_per_s"] == pytest.approx(134966 / seconds, rel=1e-5)
    assert (facts["extend_steps"], facts["decode_steps"]) == (3, 27)
    assert facts["host_ms_by_phase"] == {"schedule": 1.0, "commit": 3.0}
    assert facts["host_ms_per_step"] == 4.0
    assert (facts["retractions"], facts["cached_tokens"]) == (3 * 512, 2 * 3 * 512)
    assert facts["late_compiles"] == 0


def test_latency_protocol(monkeypatch):
    pretended = PretendedEngine(monkeypatch)
    measured = latency.measure(pretended, runs.Case("tiny", "lat8", repeats=5))
    warm, *timed = pretended.calls
    assert [[p["max_new_tokens"] for p in params] for _, params in timed] == [
        [length] * 8 for _ in range(5) for length in (1, 256)
    ]
    prompts = [tuple(ids) for call in (warm, *timed) for ids in call[0]]
    assert len(set(prompts)) == 8 * 11 and {len(ids) for ids in prompts} == {128}
    assert measured.facts["ttft_ms"] == pytest.approx(10)
    assert measured.facts["ms_per_token"] == pytest.approx(2)
    assert measured.facts["ms_per_token_runs"] == pytest.approx([2] * 5)
    assert measured.facts["tokens_per_s"] == pytest.approx(4000)
    assert measured.seconds == pytest.approx(0.002)


def test_a_first_use_in_a_timed_run_is_a_late_compile():
    before = PretendedEngine.get_server_info(SimpleNamespace(calls=[1], late=0))
    after = PretendedEngine.get_server_info(SimpleNamespace(calls=[1, 2], late=0))
    facts = engine.differences(before, after | {"programs": 9}, engine.Counts())
    assert facts["late_compiles"] == 2
    assert facts["memory_gib"] == {"weight": 1.235}


def pretend(monkeypatch, **settings):
    pretended = PretendedEngine(monkeypatch, **settings)

    @contextlib.contextmanager
    def dummy_engine(model, options, cases):
        pretended.opened = (model, options, cases)
        yield pretended, 33.0

    monkeypatch.setattr(runs, "dummy_engine", dummy_engine)
    monkeypatch.setattr(machine.Ceilings, "measure", lambda: machine.Ceilings(1e9, 1e12))
    return pretended


def test_all_cases_run_on_one_engine_into_a_file_each(monkeypatch, tmp_path, capsys):
    pretended = pretend(monkeypatch)
    runs.command(
        "", suite.BENCHMARKS,
        ["--model", "tiny", "--cases", "lat1", "prefix", "--out-dir", str(tmp_path / "new"),
         "--scale", "0.02", "--engine", '{"page_size": 8}'],
    )  # fmt: skip
    assert pretended.opened == ("tiny", {"page_size": 8}, ["lat1", "prefix"])
    assert pretended.flushes == 2 and len(pretended.calls) == (1 + 10) + (1 + 3)
    short = machine.short_name(machine.describe())
    lat1, prefix = (
        json.loads((tmp_path / "new" / f"{short}_tiny_{case}.json").read_text())
        for case in ("lat1", "prefix")
    )
    assert prefix["benchmark"] == "offline_throughput" and lat1["benchmark"] == "latency"
    assert (prefix["case"], prefix["requests"], prefix["scale"]) == ("prefix", 5, 0.02)
    assert prefix["engine"] == {"page_size": 8} and prefix["startup_seconds"] == 33.0
    floor = machine.Floor.of(workloads.SHAPES["tiny"], {})
    least = floor.decode_bytes(128 + 128) / 1e9
    assert lat1["share_of_floor"] == pytest.approx(least / 0.002, rel=1e-3)
    assert lat1["gb_per_s"] == pytest.approx(floor.decode_bytes(256) / 0.002 / 1e9, abs=0.06)
    assert {"device", "jax", "commit", "date", "memory_gib", "programs"} <= set(lat1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == prefix


def test_a_failing_case_leaves_the_others_alone_and_fails_the_run(monkeypatch, tmp_path, capsys):
    pretended = pretend(monkeypatch)
    measure = pretended.generate

    def generate(input_ids, sampling_params):
        if len(input_ids) == 8:
            raise RuntimeError("out of memory")
        return measure(input_ids, sampling_params)

    pretended.generate = generate
    with pytest.raises(SystemExit, match=r"^lat8: RuntimeError: out of memory$"):
        runs.run([latency.BENCHMARK], "tiny", ["lat8", "lat1"], tmp_path, {})
    assert [path.name.split("_")[-1] for path in tmp_path.iterdir()] == ["lat1.json"]


def test_compiling_in_a_timed_run_fails_the_run(monkeypatch):
    pretend(monkeypatch, late=1)
    with pytest.raises(SystemExit, match="lat1: 2 programs were compiled"):
        runs.run([latency.BENCHMARK], "tiny", ["lat1"], None, {}, repeats=1)


@pytest.mark.parametrize("at_once", [1, 4])
def test_host_overhead_is_per_step(at_once):
    case = host_overhead.measure(rows=4, queued=2, steps=64, at_once=at_once)
    assert case["steps_at_once"] == at_once
    assert 0 < case["median_us_per_step"] < 1000
    assert case["mean_us_per_token"] == pytest.approx(case["mean_us_per_step"] / 4, rel=0.02)


def test_a_profile_is_per_decode_step():
    """2 prompts, then 7 programs of 4 steps and 3 of one."""
    before = {"extend_steps": 5, "decode_steps": 100, "num_continuous_decode_steps": 4}
    after = before | {"extend_steps": 7, "decode_steps": 131}
    assert profile.runs_of("jit_decode_many_8", before, after, 12) == (28, "a step")
    assert profile.runs_of("jit_decode_8", before, after, 12) == (3, "a step")
    assert profile.runs_of("jit_extend_512", before, after, 12) == (1, "in all")
    single = after | {"num_continuous_decode_steps": 1}
    assert profile.runs_of("jit_decode_8", before, single, 2 + 31) == (31, "a step")


# -- floors ---------------------------------------------------------------------------------------


def test_floor_against_counting_one_token_at_a_time():
    config = workloads.SHAPES["tiny"]
    floor = machine.Floor(config, itemsize=2)
    layers, heads, kv_heads, width = 2, 4, 2, 16
    matrices = layers * (64 * (4 + 2 * 2) * 16 + 64 * 64 + 3 * 64 * 128)
    head, kv_token = 1000 * 64, layers * 2 * kv_heads * width * 2
    shared = [7] * 5
    items = [([*shared, 1, 2, 3], 4), ([*shared, 9], 2), ([*shared, 4, 4], 7)]
    flops, cached = 0, set()
    for ids, _ in items:
        for position in range(len(ids)):
            if tuple(ids[: position + 1]) not in cached:
                cached.add(tuple(ids[: position + 1]))
                flops += 2 * matrices + layers * heads * 4 * width * (position + 1)
        flops += 2 * head
    # two rows at once, 3 + 1 + 6 tokens to decode: six steps at least, for the longest output
    own = sum(len(ids) - 5 + step for ids, out in items for step in range(1, out))
    moved = 6 * (matrices + head) * 2 + kv_token * (6 * 5 + own)
    work = floor.work(items, rows=2)
    assert (work.flops, work.bytes) == (flops, moved)
    assert floor.work(items, rows=1).bytes - moved == 4 * ((matrices + head) * 2 + kv_token * 5)
    assert work.seconds(machine.Ceilings(bandwidth=100.0, rate=10.0)) == pytest.approx(
        flops / 10 + moved / 100
    )


def test_quantized_layers_and_pages_are_read_in_bytes():
    shape = workloads.SHAPES["tiny"]
    plain = machine.Floor.of(shape, {})
    whole = machine.Floor.of(shape, {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"})
    size, kv_token = plain.itemsize, 2 * 2 * 2 * 16
    head = plain.head_weights * size
    assert whole.decode_bytes(0) == plain.layer_weights + head
    assert plain.decode_bytes(0) == plain.layer_weights * size + head
    assert whole.decode_bytes(3) - whole.decode_bytes(0) == 3 * kv_token
    assert plain.decode_bytes(3) - plain.decode_bytes(0) == 3 * kv_token * size


def test_a_single_prompt_has_no_shared_part():
    floor = machine.Floor(workloads.SHAPES["tiny"], itemsize=2)
    assert floor.work([([1, 2, 3], 1)], rows=4) == machine.Work(floor.prefill_flops(3), 0)


@pytest.mark.parametrize(
    "lists, expected",
    [(([1, 2], [1, 2, 3]), 2), (([1, 2], [2, 1]), 0), (([3, 1], [3, 2], [3, 1]), 1)],
)
def test_common_prefix(lists, expected):
    assert all(machine.common_prefix(order) == expected for order in itertools.permutations(lists))


def test_ceilings_need_free_memory(monkeypatch):
    stats = {"bytes_limit": 80 << 30, "bytes_in_use": 69 << 30}
    device = SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(machine.jax, "devices", lambda: [device])
    monkeypatch.setattr(machine, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(machine, "matmul_rate", lambda: 8e14)
    with pytest.raises(MemoryError, match=r"takes 12 GiB .* 11\.0 are free"):
        machine.Ceilings.measure()
    stats["bytes_in_use"] = 1 << 30
    assert machine.Ceilings.measure() == machine.Ceilings(3e12, 8e14)


@pytest.mark.parametrize(
    "device, name",
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("Tesla T4", "t4"),
     ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "4090")],
)  # fmt: skip
def test_short_names(device, name):
    assert machine.short_name({"platform": "gpu", "device": device}) == name
    assert machine.short_name({"platform": "cpu", "device": "cpu", "cpus": 2}) == "cpu2"


# -- report ---------------------------------------------------------------------------------------

MACHINE = {
    "device": "NVIDIA H100 80GB HBM3", "platform": "gpu", "cpus": 16, "python": "3.12.3",
    "jax": "0.11.2", "jaxlib": "0.11.2", "jaxserve": "0.1.0", "commit": "abc", "date": "2026-11-25",
}  # fmt: skip
UNIFORM = MACHINE | {
    "benchmark": "offline_throughput", "model": "llama-3.1-8b", "case": "uniform", "engine": {},
    "requests": 256, "seconds": [2.0, 2.1, 1.9], "output_tokens_per_s": 10956.0,
    "share_of_floor": 0.912, "copy_gb_per_s": 3000.0, "matmul_tflop_per_s": 798.4,
    "extend_steps": 30, "decode_steps": 510, "host_ms_per_step": 0.5,
    "host_ms_by_phase": {"schedule": 0.1, "commit": 0.4}, "late_compiles": 0, "retractions": 3,
}  # fmt: skip
LAT1 = MACHINE | {
    "benchmark": "latency", "model": "llama-3.1-8b", "case": "lat1", "requests": 1,
    "engine": {"page_size": 32}, "ttft_ms": 6.0, "ms_per_token": 6.49,
    "ms_per_token_runs": [6.49, 6.5, 6.4], "gb_per_s": 2500.0, "share_of_floor": 0.84,
    "late_compiles": 0,
}  # fmt: skip


def results(tmp_path, *made, peer=True):
    for number, result in enumerate(made):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    if peer:
        name = "vllm-0.26.0_h100.json"
        (tmp_path / name).write_text((report.HERE / "results" / name).read_text())
    return figures.read(tmp_path)


def test_report_compares_with_the_peer_on_the_same_device(tmp_path):
    other = LAT1 | {"device": "NVIDIA H200"}
    text = tables.markdown(results(tmp_path, UNIFORM, LAT1, other))
    h100, h200 = text.split("## NVIDIA H200")
    assert "Ahead of vLLM 0.26.0 in 1 of 2 cases; ratios from 1.00 to 1.20" in h100
    assert "| uniform | 256 | 10,956 | 10.0% | 91% | 9,131 | 1.20 |" in h100
    assert "| lat1 | 6.490 | 1.5% | 2,500 | 84% | 6.49 | 1.00 | 6.0 | 12.0 | 2.00 |" in h100
    assert "| uniform | 30 | 510 | 0.500 | 0.100 | 0.400 |" in h100
    assert "uniform: 3 retractions." in h100
    assert 'lat1: engine options `{"page_size": 32}`.' in h100
    assert "copy 3,000 GB/s, matrix product 798 TFLOP/s" in h100
    assert "![against vLLM 0.26.0](plots/h100_llama-3.1-8b.svg)" in h100
    assert "vLLM" not in h200 and "| lat1 | 6.490 | 1.5% | 2,500 | 84% | 6.0 |" in h200


def test_the_rest_of_the_report(tmp_path):
    start = {"import_s": 1.0, "weights_s": 2.0, "compile_s": 40.0, "ready_s": 43.5,
             "first_token_s": 0.01, "programs": 70}  # fmt: skip
    times = [
        {"operation": "paged_decode", "shape": "b1", "implementation": name, "us": us,
         "floor_us": 5.0, "percent": 500 / us}
        for name, us in (("triton", 10.0), ("mosaic_sm90", 8.0), ("triton", 7.0))
    ]  # fmt: skip
    made = [
        MACHINE | {"benchmark": "startup", "model": "qwen2.5-0.5b",
                   "cold": [start, start | {"ready_s": 44.5}, start], "warm": [start]},
        MACHINE | {"benchmark": "host_overhead", "cases": [
            {"rows": 64, "queued": 10000, "median_us_per_step": 81.25, "mean_us_per_step": 90.0,
             "mean_us_per_token": 1.406}]},
        {"machine": MACHINE, "bandwidth": 3e12, "rate": 8e14, "times": times},
        MACHINE | {"benchmark": "quality", "model": "m", "cases": [{"text": "t", "loss": 2.5}]},
    ]  # fmt: skip
    text = tables.markdown(results(tmp_path, *made))
    assert "| qwen2.5-0.5b | cold | 1.0 | 2.0 | 40.0 | 43.5 | 0.010 | 70 |" in text
    assert "| qwen2.5-0.5b | vLLM 0.26.0 | 22.0 |  |  | 107.0 |  |  |" in text
    assert "| llama-3.1-8b | vLLM" not in text
    assert "| 64 | 10,000 | 81.2 | 90.0 | 1.406 |" in text
    assert "| paged_decode | b1 | 5.0 | 71% | triton 7.0, mosaic_sm90 8.0 |" in text
    assert (
        "| model |\n| --- |\n| m |" in text
        and "| text | loss |\n| --- | --- |\n| t | 2.5 |" in text
    )


def test_results_that_the_report_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"0\.json and 1\.json are both NVIDIA H100 .* uniform"):
        results(tmp_path, UNIFORM, UNIFORM | {"commit": "def"})
    with pytest.raises(ValueError, match=r"1\.json: benchmark='unifrom' is none of"):
        results(tmp_path, UNIFORM, UNIFORM | {"benchmark": "unifrom"})


def test_the_report_in_the_tree_is_that_of_the_results_in_the_tree():
    devices = figures.read(report.HERE / "results")
    text = tables.markdown(devices)
    assert (report.HERE / "REPORT.md").read_text(encoding="utf-8") == text, "run `make report`"
    shown = set(re.findall(r"\(plots/(\S+\.svg)\)", text))
    assert shown == {path.name for path in (report.HERE / "plots").iterdir()}


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import draw

    devices = results(tmp_path, UNIFORM, LAT1)
    folder = tmp_path / "plots"
    folder.mkdir()
    (folder / "stale.svg").write_text("")
    made = draw.plots(devices, folder)
    assert {path.name for path in made} == {"h100_llama-3.1-8b.svg", "h100_floor.svg"}
    assert set(folder.iterdir()) == set(made)
    first = {path: path.read_bytes() for path in made}
    draw.plots(devices, folder)
    assert first == {path: path.read_bytes() for path in made}
    against, floor = ("".join(xml.parse(path).getroot().itertext()) for path in made)
    for text in ("1.20x", "1.00x", "uniform", "lat1", "vLLM 0.26.0", "one NVIDIA H100 80GB HBM3"):
        assert text in against
    assert "91%" in floor and "84%" in floor and "llama-3.1-8b uniform" in floor
    assert b"<dc:date>" not in b"".join(first.values())


# -- with an engine -------------------------------------------------------------------------------


@pytest.mark.long
def test_the_suite_on_a_tiny_engine(tmp_path):
    options = {"precompile": True, "max_running_requests": 4, "chunked_prefill_size": 64}
    options |= {"cuda_graph_bs": [4]}
    runs.run(suite.BENCHMARKS, "tiny", ["lat1_s", "prefix"], tmp_path, options, 2, scale=0.01)
    short = machine.short_name(machine.describe())
    lat1, prefix = (
        json.loads((tmp_path / f"{short}_tiny_{case}.json").read_text())
        for case in ("lat1_s", "prefix")
    )
    assert lat1["late_compiles"] == prefix["late_compiles"] == 0
    assert (prefix["requests"], len(prefix["seconds"]), prefix["output_tokens"]) == (3, 2, 192)
    assert prefix["extend_steps"] >= 2 and prefix["decode_steps"] >= 2 * 63
    for result in (lat1, prefix):
        assert set(result["host_ms_by_phase"]) == {"schedule", "prepare", "dispatch", "commit"}
        assert result["host_ms_per_step"] > 0 and 0 < result["share_of_floor"] < 1
        assert result["programs"] > 0 and result["memory_gib"]["kvcache"] > 0
    devices = figures.read(tmp_path)
    assert "| lat1_s |" in tables.markdown(devices)


@pytest.mark.long
def test_streams_beside_a_long_prompt_on_a_tiny_engine(tmp_path):
    options = {"chunked_prefill_size": 128, "max_prefill_tokens": 1024, "precompile": True}
    options |= {"max_running_requests": 4, "cuda_graph_bs": [4]}
    result = interference.run("tiny", 1000, 3, 1, options)
    chunked, whole = result["ways"]
    assert (chunked["chunked_prefill_size"], whole["chunked_prefill_size"]) == (128, -1)
    for way in (chunked, whole):
        assert way["gap_ms"]["p50"] <= way["gap_ms"]["p99"] <= way["gap_ms"]["max"]
        assert min(way["ttft_alone_s"], way["ttft_beside_s"]) > 0
        assert way["late_compiles"] == 0
    # 8 + about 1,000 / 32 extend steps, and a gap for each stream in each of the latter
    assert chunked["extend_steps"] > 8 + 20 and chunked["gaps"] > 3 * 20
    assert whole["extend_steps"] <= 2 + 3 and whole["gaps"] <= 3 * 4
    (tmp_path / "result.json").write_text(json.dumps(result))
    text = tables.markdown(figures.read(tmp_path))
    assert "tiny: a prompt of 1,000 tokens arrives while 3 streams run" in text
    assert "| 128 |" in text and "| off |" in text


@pytest.mark.long
def test_hidden_states_of_a_tiny_engine(tmp_path):
    options = {"precompile": True, "max_running_requests": 16, "chunked_prefill_size": 512}
    options |= {"cuda_graph_bs": [16], "max_total_tokens": 16384}
    result = hidden_states.run("tiny", 0.04, 1, options)
    ways = result["ways"]
    assert result["requests"] == 10 and result["late_compiles"] == 0
    assert ways["plain"]["copied"] == ways["plain"]["asked"] == [0]
    [copied], [asked] = ways["last"]["copied"], ways["last"]["asked"]
    assert asked == 10 * 64 * 4 <= copied <= 2 * asked
    [copied], [asked] = ways["full"]["copied"], ways["full"]["asked"]
    assert asked == 10 * (512 + 255) * 64 * 4 <= copied <= 2 * asked
    (tmp_path / "result.json").write_text(json.dumps(result))
    text = tables.markdown(figures.read(tmp_path))
    assert "tiny: 10 requests, none of which, or each, asks for them." in text


@pytest.mark.long
def test_grammars_on_a_tiny_engine():
    words = ["--model", "tiny", "--rows", "3", "--constrained", "1", "--tokens", "9"]
    given = grammars.parser().parse_args([*words, "--repeats", "1", "--texts", "1"])
    result = grammars.run(given, {"precompile": False, "max_total_tokens": 2048})
    for row in result["host"]["grammars"].values():
        assert row["compile_ms"] > 0
        for kind in ("first", "again"):
            assert 0 < row[kind]["us_p50"] <= row[kind]["us_p99"]
            assert row[kind]["consume_us_p50"] > 0
    assert result["host"]["vocab_size"] == 1000 and result["engine"]["constrained"] == 1
    assert result["engine"]["mixed_to_free"] > 0
    assert result["engine"]["counted"]["mixed"]["late_compiles"] == 0


@pytest.mark.long
def test_images_on_a_tiny_engine(tmp_path):
    options = {"precompile": True, "chunked_prefill_size": 128, "max_total_tokens": 16384}
    options |= {"max_running_requests": 4, "cuda_graph_bs": [4]}
    words = ["--model", "tiny-vl", "--size", "64", "--requests", "3", "--new", "4"]
    words += ["--repeats", "2", "--scale", "0.01", "--engine", json.dumps(options)]
    result = images.run(images.parser().parse_args(words))
    assert (result["patches"], result["image_tokens"]) == (256, 64)
    throughput, beside = result["throughput"], result["beside_streams"]
    assert throughput["prompt_tokens"] == 64 + 64 and len(throughput["seconds"]) == 2
    assert throughput["late_compiles"] == throughput["cached_tokens"] == 0
    assert 0 < result["share_of_floor"] < 1 and 0 < result["encode_share_of_floor"] < 1
    assert throughput["first_token_ms"] > throughput["encode_ms"] > 0
    assert beside["streams"] == 1
    assert 0 < beside["gap_ms"]["p50"] <= beside["gap_ms"]["max"] < 1e3 * beside["images_in_s"]
    text = result["text"]
    assert len(text["seconds"]) == len(text["text_model_seconds"]) == 2
    (tmp_path / "result.json").write_text(json.dumps(result))
    shown = tables.markdown(figures.read(tmp_path))
    assert "tiny-vl: 3 requests of an image of 64 x 64 pixels (64 tokens), 4 new tokens;" in shown


def test_gaps_are_those_that_overlap_the_span():
    assert interference.gaps([0, 1, 3, 6, 10], since=2, until=5) == [2, 3]
    assert interference.gaps([0, 1], since=2, until=5) == []
    values = [float(i) for i in range(1, 201)]
    shares = (0.5, 0.99, 1.0)
    assert [interference.percentile(values, share) for share in shares] == [100, 198, 200]
    assert interference.percentile([3.0], 0.99) == 3


@pytest.mark.long
def test_cold_and_warm_starts_of_a_tiny_engine(tmp_path):
    options = {"precompile": True, "max_running_requests": 1, "chunked_prefill_size": 64}
    result = startup.run("tiny", options, rounds=1, kept=tmp_path / "programs")
    assert any((tmp_path / "programs").iterdir())
    (cold,), (warm,) = result["cold"], result["warm"]
    assert cold["programs"] == warm["programs"] > 0
    assert warm["compile_s"] < cold["compile_s"]
    for start in (cold, warm):
        parts = start["import_s"] + start["weights_s"] + start["compile_s"]
        assert 0 < parts < start["ready_s"] and start["first_token_s"] > 0
        assert start["late_compiles"] == 0
    assert result["engine"] == {**options, "wait_until_compiled": True}
    assert result["jax"] and result["date"]


def test_outputs_are_compared_bit_by_bit():
    def row(tokens, *logprobs):
        return {"tokens": tokens, "logprobs": [[[value, 7, None] for value in logprobs]]}

    base = [row([1, 2, 3], -0.5, -1.5), row([4, 5], -2.0)]
    assert outputs.compared(base, [row([1, 2, 3], -0.5, -1.5), row([4, 5], -2.0)]) == "the same"
    other = [row([1, 9, 3], -9.0, -9.0), row([4, 5], -2.25)]
    said = "3 of 5 tokens before a difference, logprobs within 2.5e-01"
    assert outputs.compared(base, other) == said
