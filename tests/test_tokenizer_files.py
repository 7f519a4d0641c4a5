"""Tokenizer files that nobody should trust: refused by name, soon."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest

import converters
from converters import tokenizer_checks
from jaxserve.errors import ModelLoadError
from tests.checkpoints import write_tokenizer


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


def change(folder: Path, name: str = "tokenizer.json", **values) -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(data | values))


def replace(text: str, content: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: text}, "content": content}


def sequence(key: str, parts: list) -> dict:
    return {"type": "Sequence", key: parts}


def added(count: int, first: int) -> list:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": first + i, "content": f"<t{i}>", **flags, "special": True} for i in range(count)]


HUNDRED = [replace("a", "a" * 100)] * 6
TEMPLATE = {
    "type": "TemplateProcessing", "pair": [], "special_tokens": {},
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", sequence("normalizers", HUNDRED)),
        ("normalizer", sequence("normalizers", [replace("x*", "xx" * 50, "Regex")] * 2)),
        ("normalizer", sequence("normalizers", [{"type": "Prepend", "prepend": "x" * 70_000}])),
        ("normalizer", sequence("normalizers", [sequence("normalizers", [{"type": "NFKD"}] * 3)])),
        ("decoder", sequence("decoders", HUNDRED)),
        ("post_processor", sequence("processors", [TEMPLATE] * 3)),
        ("pre_tokenizer", sequence("pretokenizers", [
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}] * 20)),
    ],
)  # fmt: skip
def test_a_tokenizer_that_makes_text_without_bound_is_refused(folder, part, value):
    """ "a" would become 100**6 of them."""
    change(folder, **{part: value})
    with pytest.raises(ModelLoadError, match=f"the tokenizer's {part} may make") as caught:
        converters.load_tokenizer(str(folder))
    assert len(str(caught.value)) < 1000


def test_what_models_use_is_taken(folder):
    from examples.demo_model import fetch

    assert converters.load_tokenizer(str(fetch()))
    parts = [{"type": "NFKC"}, {"type": "Lowercase"}, replace(" {2,}", "▁", "Regex"),
             {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]  # fmt: skip
    change(folder, normalizer=sequence("normalizers", parts))
    assert converters.load_tokenizer(str(folder))("A b")["input_ids"]


@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
def test_many_special_names_are_refused_at_once(folder, key):
    """transformers' time goes with their square: 100,000 are more than a minute."""
    change(folder, "tokenizer_config.json", **{key: [f"<t{i}>" for i in range(100_000)]})
    began = time.process_time()
    with pytest.raises(ModelLoadError, match=f"{key} has 100000 tokens; at most 4096"):
        converters.load_tokenizer(str(folder))
    assert time.process_time() - began < 15  # transformers' import included


def test_many_added_tokens_are_refused_before_they_are_loaded(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_checks, "MOST_ADDED", 2000)
    change(folder, added_tokens=added(2001, 512))
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: added_tokens has 2001 tokens"):
        converters.load_tokenizer(str(folder))
    write_tokenizer(folder)
    decoder = {str(token["id"]): token for token in added(2001, 512)}
    change(folder, "tokenizer_config.json", added_tokens_decoder=decoder)
    with pytest.raises(ModelLoadError, match="added_tokens_decoder has 2001 tokens"):
        converters.load_tokenizer(str(folder))


def test_some_thousand_added_tokens_load_soon(folder):
    converters.load_tokenizer(str(folder))
    data = json.loads((folder / "tokenizer.json").read_text())
    change(folder, added_tokens=data["added_tokens"] + added(8000, 512))
    began = time.process_time()
    tokenizer = converters.load_tokenizer(str(folder))
    assert time.process_time() - began < 5
    assert tokenizer("<t7999>")["input_ids"] == [512 + 7999]


def test_many_control_tokens_of_a_gguf_are_refused(monkeypatch, tmp_path):
    from examples.demo_model import fetch

    monkeypatch.setattr(tokenizer_checks.check_count, "__defaults__", (3,))
    with pytest.raises(ModelLoadError, match=r"tokenizer\.ggml\.token_type.* has 17 tokens"):
        converters.load_tokenizer(str(fetch()))


@pytest.mark.parametrize(
    "table",
    [b"", b"abc", b"\xff\xff\xff\x7f", (8).to_bytes(4, "little") + b"\xff" * 8 + b"x" * 5000]
)  # fmt: skip
def test_a_bad_table_of_characters_is_a_load_error(folder, table):
    """A panic of Rust code at load, which is no Exception; or else text without bound."""
    charsmap = base64.b64encode(table).decode()
    change(folder, normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap})
    try:
        tokenizer = converters.load_tokenizer(str(folder))
    except ModelLoadError as error:
        assert str(folder) in str(error)
    else:
        from jaxserve.errors import RequestFailedError
        from jaxserve.text.codec import Codec

        try:
            Codec(tokenizer).encode("prompt", ["hello wörld"])
        except (ModelLoadError, RequestFailedError) as error:
            assert "tokenizer" in str(error)


def test_a_panic_while_loading_is_a_load_error(folder, monkeypatch):
    class PanicException(BaseException):
        __module__ = "pyo3_runtime"

    import transformers

    def panic(*args, **options):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(ModelLoadError, match=r"no usable tokenizer.*index out of bounds"):
        converters.load_tokenizer(str(folder))
    for error in (KeyboardInterrupt, SystemExit):
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", _raising(error))
        with pytest.raises(error):
            converters.load_tokenizer(str(folder))


def _raising(error):
    def raising(*args, **options):
        raise error

    return raising


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "5", '{"model": 5}', "[" * 100_000, '{"added_tokens": 5}', "\udc80"]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_of_another_shape_are_load_errors(folder, name, text):
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    try:
        converters.load_tokenizer(str(folder))
    except ModelLoadError as error:
        assert str(folder) in str(error) and len(str(error)) < 10_000


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_class_without_its_files_is_no_tokenizer(folder, kind):
    """transformers makes an empty one, and every prompt would be unknown tokens."""
    (folder / "tokenizer.json").unlink()
    change(folder, "tokenizer_config.json", tokenizer_class=kind)
    with pytest.raises(ModelLoadError, match=r"no vocabulary but .* special tokens"):
        converters.load_tokenizer(str(folder))
