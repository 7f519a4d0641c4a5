"""`python -m tests.batch_crashes FOLDER`: a job killed at each of its calls that change the disk,
and begun again. Without JAX, so that it may fork.

Prints "POINTS n" when every run was right after every crash.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import jaxserve.batch
from tests import batch_engine

ROWS = 20
CALLS = ("fsync", "replace", "rename", "unlink", "mkdir")
CRASHED = 77


def crash_at(point):
    """From now on, this process ends within its `point`th call of one of CALLS: before the call of
    an even number, after that of an odd one."""
    count = itertools.count()

    def crashing(call):
        def replacement(*arguments, **more):
            number = next(count)
            if number == point and not point % 2:
                os._exit(CRASHED)
            result = call(*arguments, **more)
            if number == point:
                os._exit(CRASHED)
            return result

        return replacement

    for name in CALLS:
        setattr(os, name, crashing(getattr(os, name)))


def run(rows, out):
    return jaxserve.batch.run(
        rows, out, "model", part_rows=4, parts_in_flight=1, progress=False, runner="local"
    )


def crashes(rows, out, point):
    """Whether the job was killed; otherwise it has finished."""
    child = os.fork()
    if not child:
        try:
            crash_at(point)
            run(rows, out)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(status)
    assert status in (0, CRASHED), (point, status)
    return status == CRASHED


def check(rows, out):
    """The output of a finished job: each row once, and nothing else in the folder."""
    lines = [
        json.loads(line)
        for path in sorted(Path(out).glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert [line["index"] for line in lines] == list(range(ROWS))
    assert [line["text"].partition("|")[0] for line in lines] == [row["prompt"] for row in rows]
    assert sorted(os.listdir(out)) == ["_job", *(f"part-{n:06d}.jsonl" for n in range(5))]
    assert os.listdir(Path(out) / "_job" / "unfinished") == []


def main(folder):
    batch_engine.install()
    rows = [{"prompt": f"p{number}"} for number in range(ROWS)]
    for points in itertools.count(0):
        out = f"{folder}/{points}"
        if not crashes(rows, out, points):
            break
        there = {path: path.stat().st_ino for path in Path(out).glob("*.jsonl")}
        if points % 3:  # and once more, in what follows the crash
            crashes(rows, out, points // 2)
        report = run(rows, out)
        check(rows, out)
        # what was there was not written again
        assert all(path.stat().st_ino == inode for path, inode in there.items())
        assert report.total.rows == ROWS
        assert report.now.rows <= ROWS - 4 * len(there)
        before, engines = report.total, batch_engine.EchoEngine.started
        again = run(rows, out)
        assert (again.now.rows, again.total) == (0, before)
        assert batch_engine.EchoEngine.started == engines
    check(rows, out)
    print("POINTS", points)


if __name__ == "__main__":
    main(sys.argv[1])
