"""The report's plots: SVGs whose bytes depend on the figures and matplotlib's version alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from benchmarks.figures import Device, Figure

OURS, THEIRS, FLOOR = "#1b6ca8", "#b0b7bf", "#d9dee3"
STYLE: Any = {
    "svg.hashsalt": "jaxserve",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plots(devices: Sequence[Device], folder: Path) -> list[Path]:
    """Writes every plot that the report shows into `folder`, and removes the SVGs it does not."""
    made = []
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for device in devices:
            for model in sorted({figure.model for figure in device.compared}):
                of_model = [figure for figure in device.compared if figure.model == model]
                title = f"{model}, one {device.name}"
                canvas = against(title, of_model, device.peer["engine"])
                made.append(save(canvas, folder / f"{device.short}_{model}.svg"))
            if device.figures:
                made.append(save(floor(device), folder / f"{device.short}_floor.svg"))
    for stale in set(folder.glob("*.svg")) - set(made):
        stale.unlink()
    return made


def against(title: str, figures: list[Figure], peer: str) -> Canvas:
    """Bars of ours and the peer's: throughputs on the left, times a token on the right."""
    groups = [
        ("output tokens/s (more is better)", [f for f in figures if f.throughput]),
        ("ms a token (less is better)", [f for f in figures if not f.throughput]),
    ]
    groups = [group for group in groups if group[1]]
    canvas = Canvas(figsize=(9, 3.2), layout="constrained")
    widths = [len(group) for _, group in groups]
    panels = canvas.subplots(1, len(groups), squeeze=False, width_ratios=widths)[0]
    for axes, (label, group) in zip(panels, groups, strict=True):
        pairs(axes, group, peer)
        axes.set_ylabel(label)
    panels[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    canvas.suptitle(title)
    return canvas


def pairs(axes: Axes, figures: list[Figure], peer: str) -> None:
    """Two bars a case, the ratio of speeds on ours."""
    places = range(len(figures))
    ours = axes.bar(
        [x - 0.2 for x in places], [f.value for f in figures], 0.38, color=OURS, label="jaxserve"
    )
    theirs: list[Any] = [figure.their_value for figure in figures]
    axes.bar([x + 0.2 for x in places], theirs, 0.38, color=THEIRS, label=peer)
    axes.bar_label(ours, [f"{f.ratio:.2f}x" for f in figures], padding=1)
    axes.set_xticks(list(places), [f.case for f in figures])


def floor(device: Device) -> Canvas:
    """Share of the physical floor of every case."""
    figures = device.figures[::-1]
    canvas = Canvas(figsize=(9, 0.8 + 0.26 * len(figures)), layout="constrained")
    axes = canvas.subplots()
    places = list(range(len(figures)))
    axes.barh(places, [100.0] * len(figures), color=FLOOR)
    bars = axes.barh(places, [100 * f.share for f in figures], color=OURS)
    axes.bar_label(bars, [f"{100 * f.share:.0f}%" for f in figures], padding=3)
    axes.set_yticks(places, [f"{f.model} {f.case}" for f in figures])
    axes.set_xlim(0, 100)
    axes.set_title(f"share of the physical floor, one {device.name}")
    return canvas


def save(canvas: Canvas, path: Path) -> Path:
    canvas.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return path
