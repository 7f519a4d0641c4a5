"""docs/add_an_output.md, done as it says: in a copy of the source, and against Hugging Face."""

from __future__ import annotations

import pytest

from tests.page_patch import patched_copy, run_there

pytest.importorskip("torch")


@pytest.mark.slow
def test_the_page_adds_an_output(tmp_path):
    assert patched_copy("add_an_output.md", tmp_path) == [
        "jaxserve/sampler/entropy.py", "jaxserve/step/payloads.py", "jaxserve/output/entropy.py",
        "jaxserve/api/arguments.py", "jaxserve/api/extras.py",
    ]  # fmt: skip
    run_there("tests.added_output", tmp_path)
