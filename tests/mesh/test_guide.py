"""The guide's page with as many devices as it is about."""

from __future__ import annotations

import re

import pytest

from tests import test_docs, test_examples


@pytest.mark.long
def test_the_page_runs_on_several_devices(tiny_models, tmp_path, monkeypatch):
    path = test_docs.ROOT / "docs/guide/many_gpus.md"
    test_docs.run_page(path, tiny_models("llama"), tmp_path, monkeypatch)


@pytest.mark.long
def test_the_example_of_a_sharded_batch(tiny_models):
    printed = test_examples.run(
        "sharded_batch.py", "--model", tiny_models("llama"), "--tensor", "2", "--prompts", "12"
    )
    [shares] = re.findall(r"12 answers, by the rows of the mesh: \[(.*)\]", printed)
    shares = [int(share) for share in shares.split(", ")]
    assert len(shares) == 4 and sum(shares) == 12 and min(shares) > 0
