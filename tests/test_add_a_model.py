"""docs/add_a_model.md, done as it says: in a copy of the source, and against Hugging Face."""

from __future__ import annotations

import pytest

from tests.page_patch import patched_copy, run_there

pytest.importorskip("torch")


@pytest.mark.slow
def test_the_page_adds_a_family(tmp_path):
    assert patched_copy("add_a_model.md", tmp_path) == [
        "jaxserve/models/gemma2.py", "jaxserve/models/registry.py", "converters/tables.py",
    ]  # fmt: skip
    run_there("tests.added_model", tmp_path)
