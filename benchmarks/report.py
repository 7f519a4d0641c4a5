"""Makes benchmarks/REPORT.md and benchmarks/plots/ from the JSON files in benchmarks/results/.

    python -m benchmarks.report         # or `make report`; needs the bench extra (matplotlib)

Every figure is copied or divided here, none is typed. The same files give the same bytes. A device,
model and case may be in one file only; put older ones into a folder below results/.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import tables
from benchmarks.figures import read

HERE = Path(__file__).parent


def main() -> None:
    from benchmarks import draw  # needs matplotlib

    devices = read(HERE / "results")
    (HERE / "REPORT.md").write_text(tables.markdown(devices), encoding="utf-8")
    draw.plots(devices, HERE / "plots")


if __name__ == "__main__":
    main()
