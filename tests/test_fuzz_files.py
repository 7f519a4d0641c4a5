"""Changed model files, the same ones each time; the share of each outcome is printed (`-s`)."""

from __future__ import annotations

import pytest

from tests.fuzz import files


def check(outcomes: list[files.Outcome]) -> None:
    print(files.table(outcomes))
    assert not [outcome for outcome in outcomes if outcome.is_fault]
    loaded = sum(outcome.ended.startswith("answers") for outcome in outcomes)
    assert loaded >= len(outcomes) / 10, "hardly a file was a good one"


@pytest.mark.slow
def test_files_load_and_answer_or_are_refused(tmp_path):
    check(files.fuzz(tmp_path, 8, seed=0))


@pytest.mark.long
@pytest.mark.parametrize("seed", [1000, 1500])
def test_hundreds_of_files(tmp_path, seed):
    """`python -m tests.fuzz.files` takes as many as one likes."""
    check(files.fuzz(tmp_path, 80, seed))
