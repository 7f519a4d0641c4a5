"""The pages that add something, against what they say: see tests/added_model.py for a family, and
tests/added_hooks.py for a field, a program and an option."""

from __future__ import annotations

import pytest

from tests.adding import apply, check_style, copy_source, run


@pytest.mark.long
def test_the_page_adds_a_family(tmp_path):
    pytest.importorskip("torch")
    copy_source(tmp_path)
    own, touched = apply("add_a_model.md", tmp_path)
    assert own == ["jaxserve/models/exaone4.py"]
    assert touched == ["jaxserve/models/registry.py", "converters/tables.py"]
    check_style(tmp_path, own + touched)
    run("tests.added_model", tmp_path)


HOOKS = {"add_a_field.md": 2, "add_a_program.md": 3, "add_an_option.md": 2}
"""How many files each of them may touch, beside those that it adds."""


@pytest.mark.long
def test_the_pages_add_a_field_a_program_and_an_option(tmp_path, tiny_models):
    copy_source(tmp_path)
    files = []
    for page, most in HOOKS.items():
        own, touched = apply(page, tmp_path)
        assert 0 < len(set(touched)) <= most, (page, touched)
        files += own + touched
    check_style(tmp_path, files)
    run("tests.added_hooks", tmp_path, tiny_models("llama"))


@pytest.mark.long
def test_the_page_adds_an_output(tmp_path):
    pytest.importorskip("torch")
    copy_source(tmp_path)
    own, touched = apply("add_an_output.md", tmp_path)
    assert own == ["jaxserve/sampler/entropy.py", "jaxserve/output/entropy.py"]
    assert 0 < len(set(touched)) <= 3, touched
    check_style(tmp_path, own + touched)
    run("tests.added_output", tmp_path)
