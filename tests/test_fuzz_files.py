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
    check(files.fuzz(tmp_path, 20, seed=0))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1000, 2000, 250))
def test_a_thousand_files(tmp_path, seed):
    check(files.fuzz(tmp_path, 250, seed))
