"""REPORT.md's text from the results that benchmarks/figures.py has read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.figures import Device, Figure, Result

INTRODUCTION = """# Figures

Made by `make report` from the files in `results/`, which have the versions, the commit, the
engine's options and every repeat; not to be edited. Models have random weights in bfloat16 (float32
on a CPU); token ids go in, lengths are forced, nothing is detokenized. Cases: `workloads.py`; `_s`
are sampled (temperature 0.8, top-p 0.95), the others greedy. Spread: (largest - smallest) / median
of the repeats. Floor: the prefill's FLOPs at the measured matrix rate plus the decode steps' bytes
at the measured copy bandwidth. Ratios are of speed: above 1 jaxserve is the faster one.
"""
MACHINE = (
    "device", "platform", "cpus", "python", "jax", "jaxlib", "jaxserve", "commit", "date",
    "benchmark",
)  # fmt: skip
FAULT_COSTS = ("injected", "failed_calls", "recomputed_requests", "recomputed_tokens")


def number(value: float | None, digits: int = 0, unit: str = "") -> str:
    return "" if value is None else f"{value:,.{digits}f}{unit}"


def percent(share: float | None, digits: int = 0) -> str:
    return number(None if share is None else 100 * share, digits, "%")


def table(header: str, rows: Iterable[Sequence[str]]) -> str:
    """`header`: column names, with " | " between them."""
    names = header.split(" | ")
    lines = [f"| {header} |", "|" + " --- |" * len(names)]
    for row in rows:
        assert len(row) == len(names), row
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def markdown(devices: Sequence[Device]) -> str:
    """The text of REPORT.md."""
    parts = [INTRODUCTION.strip()]
    for peer in [device.peer for device in devices if device.peer]:
        parts.append(
            f"{peer['engine']} on one {peer['device']} ({peer['date']}): {peer['settings']}."
        )
    for device in devices:
        parts += [f"## {device.name}", measured_with(device)]
        if device.compared:
            parts += [summary(device)]
        for model in sorted({figure.model for figure in device.figures}):
            parts += model_section(device, model)
        if device.figures:
            parts += [f"![share of the floor](plots/{device.short}_floor.svg)"]
        parts += start_up(device) + host_overhead(device) + kernels(device) + quality(device)
        parts += beside_transformers(device) + loading(device) + under_load(device)
        parts += interference(device) + hidden_states(device) + images(device)
    return "\n\n".join(parts) + "\n"


def measured_with(device: Device) -> str:
    """Versions, dates and commits, and the ceilings of the runs."""
    results = [r for results in device.results.values() for r in results]

    def values(name: str) -> str:
        return ", ".join(sorted({str(r[name]) for r in results if name in r}))

    text = f"jax {values('jax')}, Python {values('python')}; {values('date')}; "
    text += f"commit {values('commit')}."
    ceilings = [r for r in results if "copy_gb_per_s" in r]
    if ceilings:
        copy = statistics.median(r["copy_gb_per_s"] for r in ceilings)
        text += f" Measured ceilings: copy {number(copy)} GB/s"
        products = [r["matmul_tflop_per_s"] for r in ceilings if "matmul_tflop_per_s" in r]
        if products:
            product = statistics.median(products)
            text += f", matrix product {number(product, 0 if product > 10 else 2)} TFLOP/s"
        text += "."
    return text


def summary(device: Device) -> str:
    """How many cases are won."""
    ratios = [figure.ratio for figure in device.compared if figure.ratio is not None]
    ahead = sum(ratio > 1 for ratio in ratios)
    return (
        f"Ahead of {device.peer['engine']} in {ahead} of {len(ratios)} cases; ratios from "
        f"{min(ratios):.2f} to {max(ratios):.2f}, geometric mean "
        f"{statistics.geometric_mean(ratios):.2f}."
    )


def model_section(device: Device, model: str) -> list[str]:
    figures = [figure for figure in device.figures if figure.model == model]
    offline = [figure for figure in figures if figure.throughput]
    latency = [figure for figure in figures if not figure.throughput]
    peer = device.peer.get("engine", "peer")
    parts = [f"### {model}"]
    if any(figure.ratio for figure in figures):
        parts.append(f"![against {peer}](plots/{device.short}_{model}.svg)")
    if offline:
        header = "case | requests | output tokens/s | spread | share of floor"
        header += f" | {peer} | ratio" if device.peer else ""
        rows = [
            [f.case, number(f.result["requests"]), number(f.value), percent(f.spread, 1),
             percent(f.share), *compared(device, f, 0)]
            for f in offline
        ]  # fmt: skip
        parts.append(table(header, rows))
    if latency:
        header = "case | ms a token | spread | GB/s | share of floor"
        header += f" | {peer} | ratio" if device.peer else ""
        header += " | first token, ms" + (f" | {peer} | ratio" if device.peer else "")
        rows = [
            [f.case, number(f.value, 3), percent(f.spread, 1), number(f.result["gb_per_s"]),
             percent(f.share), *compared(device, f, 2), number(f.result["ttft_ms"], 1),
             *first_token(device, f)]
            for f in latency
        ]  # fmt: skip
        parts.append(table(header, rows))
    return parts + host_by_phase(figures) + [note for f in figures for note in notes(f)]


def compared(device: Device, figure: Figure, digits: int) -> list[str]:
    if not device.peer:
        return []
    return [number(figure.their_value, digits), number(figure.ratio, 2)]


def first_token(device: Device, figure: Figure) -> list[str]:
    if not device.peer:
        return []
    theirs = figure.theirs.get("ttft_ms")
    return [number(theirs, 1), number(theirs and theirs / figure.result["ttft_ms"], 2)]


def host_by_phase(figures: list[Figure]) -> list[str]:
    """The engine thread's own time for a step of the timed runs."""
    having = [figure for figure in figures if "host_ms_by_phase" in figure.result]
    if not having:
        return []
    phases = list(having[0].result["host_ms_by_phase"])
    rows = []
    for figure in having:
        r = figure.result
        ms = [number(r["host_ms_by_phase"][phase], 3) for phase in phases]
        rows.append([figure.case, number(r["extend_steps"]), number(r["decode_steps"]),
                     number(r["host_ms_per_step"], 3), *ms])  # fmt: skip
    header = f"case | extend steps | decode steps | host, ms a step | {' | '.join(phases)}"
    return [table(header, rows)]


def notes(figure: Figure) -> list[str]:
    """What makes a figure another one than its neighbours."""
    r, said = figure.result, []
    if r.get("engine"):
        said.append(f"engine options `{json.dumps(r['engine'])}`")
    if r.get("scale", 1) != 1:
        said.append(f"{r['scale']} of the requests")
    if r.get("late_compiles"):
        said.append(f"{r['late_compiles']} programs compiled in the timed runs")
    if r.get("retractions"):
        said.append(f"{r['retractions']} retractions")
    if r.get("cached_tokens"):
        said.append(f"{number(r['cached_tokens'])} prompt tokens from the prefix cache")
    return [f"{figure.case}: {'; '.join(said)}."] if said else []


def start_up(device: Device) -> list[str]:
    rows = []
    for result in sorted(device.of("startup"), key=lambda r: r["model"]):
        for kind in ("cold", "warm"):
            names = ("import_s", "weights_s", "compile_s", "ready_s", "first_token_s")
            median = {n: statistics.median(run[n] for run in result[kind]) for n in names}
            seconds = [number(median[name], 1) for name in names[:4]]
            first, programs = number(median["first_token_s"], 3), result[kind][0]["programs"]
            rows.append([result["model"], kind, *seconds, first, number(programs)])
    measured = {row[0] for row in rows}
    for model, cases in device.peer.get("models", {}).items():
        if model in measured and "startup" in cases:
            ready = cases["startup"]["import_s"] + cases["startup"]["engine_s"]
            rows.append([model, device.peer["engine"], number(cases["startup"]["import_s"], 1),
                         "", "", number(ready, 1), "", ""])  # fmt: skip
    header = "model | start | import, s | weights | compile | ready | first token | programs"
    return ["### Start-up", table(header, rows)] if rows else []


def host_overhead(device: Device) -> list[str]:
    rows = [
        [number(c["rows"]), number(c["queued"]), number(c["median_us_per_step"], 1),
         number(c["mean_us_per_step"], 1), number(c["mean_us_per_token"], 3)]
        for result in device.of("host_overhead") for c in result["cases"]
    ]  # fmt: skip
    header = "rows | queued | us a step, median | mean | us a token"
    return ["### Scheduling, packing, committing", table(header, rows)] if rows else []


def kernels(device: Device) -> list[str]:
    """The fastest sizes of each implementation, the fastest implementation first."""
    best: dict[tuple[str, str], dict[str, Result]] = {}
    for result in device.of("kernels"):
        for row in result["times"]:
            found = best.setdefault((row["operation"], row["shape"]), {})
            name = row["implementation"]
            if name not in found or row["us"] < found[name]["us"]:
                found[name] = row
    rows = []
    for (operation, shape), found in best.items():
        order = sorted(found.values(), key=lambda row: row["us"])
        cells = [f"{r['implementation']} {number(r['us'], 1)}" for r in order]
        rows.append([operation, shape, number(order[0]["floor_us"], 1),
                     percent(order[0]["percent"] / 100), ", ".join(cells)])  # fmt: skip
    header = "operation | shape | floor, us | share of floor | us a call"
    return ["### Kernels", table(header, rows)] if rows else []


def quality(device: Device) -> list[str]:
    """Single values as one table, each list of records as another."""
    parts = []
    for result in device.of("quality"):
        facts = {name: value for name, value in result.items() if name not in MACHINE}
        plain = {n: v for n, v in facts.items() if not isinstance(v, dict | list)}
        if plain:
            parts.append(table(" | ".join(plain), [[str(v) for v in plain.values()]]))
        for name, value in facts.items():
            records = [value] if isinstance(value, dict) else value
            if isinstance(records, list) and records and isinstance(records[0], dict):
                rows = [[str(v) for v in record.values()] for record in records]
                parts += [f"{name}:", table(" | ".join(records[0]), rows)]
    return ["### Quality", *parts] if parts else []


def beside_transformers(device: Device) -> list[str]:
    parts = []
    for r in device.of("cpu"):
        rows = [
            [case, number(r[case]["jaxserve_tokens_per_s"], 1),
             number(r[case]["transformers_tokens_per_s"], 1), number(r[case]["ratio"], 2)]
            for case in ("single", "batch16")
        ]  # fmt: skip
        header = f"{r['model']} | jaxserve, tokens/s | transformers {r['transformers']} | ratio"
        parts += ["### Beside transformers", table(header, rows)]
    return parts


def loading(device: Device) -> list[str]:
    parts = []
    for r in device.of("load"):
        rows = [
            [name, number(f["first_s"], 2), number(f["later_s"], 2), number(f["peak_mib"]),
             number(f["model_mib"])]
            for name, f in r["formats"].items()
        ]  # fmt: skip
        header = f"{r['model']} as {r['dtype']} | first load, s | later | peak, MiB | model, MiB"
        parts += ["### Loading", table(header, rows)]
    return parts


def under_load(device: Device) -> list[str]:
    parts = []
    for r in device.of("load_test"):
        seconds, memory = r["call_seconds"], r["rss_mib"]
        row = [
            number(r["requests"]), number(r["seconds"], 1), number(seconds["p50"], 2),
            number(seconds["p99"], 2), number(seconds["max"], 2),
            *(number(memory[mark], 1) for mark in ("25%", "50%", "100%")),
            number(len(r["violations"])),
        ]  # fmt: skip
        header = (
            "requests | s | s a call, median | p99 | most | MiB at 25% | 50% | 100% | violations"
        )
        faults = [
            [kind, *(number(fault[name]) for name in FAULT_COSTS)]
            for kind, fault in r["faults"].items()
        ]
        costs = "failure | injected | calls failed | requests recomputed | their tokens"
        parts += ["### Load with failures", table(header, [row]), table(costs, faults)]
    return parts


def interference(device: Device) -> list[str]:
    parts = []
    for r in device.of("interference"):
        rows = [
            [chunks(way["chunked_prefill_size"]), number(way["undisturbed_gap_ms"], 1),
             *(number(way["gap_ms"][name], 1) for name in ("p50", "p99", "max")),
             number(way["ttft_beside_s"], 2), number(way["ttft_alone_s"], 2),
             number(way["ttft_ratio"], 2)]
            for way in r["ways"]
        ]  # fmt: skip
        said = f"{r['model']}: a prompt of {number(r['prompt_tokens'])} tokens arrives while "
        said += f"{r['streams']} streams run; gaps between their tokens until its first one."
        header = (
            "chunks | gap before, ms | p50 | p99 | largest | its first token, s | alone | ratio"
        )
        parts += ["### A long prompt beside streams", said, table(header, rows)]
    return parts


def hidden_states(device: Device) -> list[str]:
    parts = []
    for r in device.of("hidden_states"):
        rows = [
            [
                name,
                number(statistics.median(way["seconds"]), 2),
                number(way["throughput_ratio"], 3),
                number(statistics.median(way["step_ms"]), 3),
                number(way["step_ratio"], 3),
                *(number(statistics.median(way[key]) / 1e6, 1) for key in ("asked", "copied")),
            ]
            for name, way in r["ways"].items()
        ]
        said = f"{r['model']}: {r['requests']} requests, none of which, or each, asks for them."
        header = "asked for | s | throughput | step, ms | of plain's | MB asked for | MB copied"
        parts += ["### Hidden states", said, table(header, rows)]
    return parts


def images(device: Device) -> list[str]:
    parts = []
    for r in device.of("images"):
        found, beside = r["throughput"], r["beside_streams"]
        row = [
            number(found["images_per_s"], 1),
            f"{r['share_of_floor']:.0%}",
            number(found["first_token_ms"], 1),
            number(found["encode_ms"], 2),
            f"{r['encode_share_of_floor']:.0%}",
            *(number(ms, 1) for ms in (beside["undisturbed_gap_ms"], beside["gap_ms"]["max"])),
            number(r["text"]["throughput_ratio"], 3),
        ]
        said = f"{r['model']}: {r['requests']} requests of an image of {r['size']} x {r['size']} "
        said += f"pixels ({r['image_tokens']} tokens), {r['new_tokens']} new tokens; text: share "
        said += f"of a text model's throughput; gaps of {beside['streams']} streams."
        header = "images/s | of floor | first token, ms | tower, ms | of floor | gap, ms | largest"
        parts += ["### Images", said, table(f"{header} | text", [row])]
    return parts


def chunks(size: int | None) -> str:
    """A chunked_prefill_size in words."""
    if size is None:
        return "by default"
    return "off" if size == -1 else number(size)
