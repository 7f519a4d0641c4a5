"""The guide's page with as many devices as it is about."""

from __future__ import annotations

from tests import test_docs


def test_the_page_runs_on_several_devices(tiny_models, tmp_path, monkeypatch):
    path = test_docs.ROOT / "docs/guide/many_gpus.md"
    test_docs.test_the_examples_of_a_page_run_in_their_order(
        path, tiny_models, tmp_path, monkeypatch
    )
