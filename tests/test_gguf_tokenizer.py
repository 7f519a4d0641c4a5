"""Tokenizers from GGUF metadata, against transformers and a brute-force SentencePiece."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from converters import gguf_config
from converters.gguf_pretokenizers import splitting
from converters.gguf_tokenizer import build_tokenizer
from examples.demo_model import fetch
from jaxserve.errors import ModelLoadError, NotSupportedError
from tests import gguf_files
from tests.gguf_files import CORPUS

CHAT = "<|im_start|>user\nHi <|im_end|><|im_start|>assistant\n"
WITH_SPECIALS = (*CORPUS, CHAT, " <|im_end|> a <|endoftext|>", "<|im_start", "a<tool> b<tool>")
MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is the capital of France?"},
]
PRES = (
    "default", "gpt-2", "llama3", "llama-v3", "llama-bpe", "smaug-bpe", "qwen2",
    "deepseek-r1-qwen", "megrez", "smollm", "starcoder", "refact", "minerva-7b", "tekken",
    "deepseek-llm", "deepseek-coder", "deepseek-v3", "dbrx", "glm4", "gpt-4o", "command-r",
)  # fmt: skip


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def transformers_own(path):
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def build(tmp_path, metadata=None, **options):
    path = tmp_path / "tiny.gguf"
    gguf_files.write_model(path, metadata=metadata, **options)
    return build_tokenizer(str(path))


@pytest.fixture(scope="module")
def smollm2():
    return build_tokenizer(str(fetch()))


@pytest.fixture(scope="module")
def smollm2_of_transformers():
    return transformers_own(fetch())


# SmolLM2


def test_smollm2_ids_equal_transformers(smollm2, smollm2_of_transformers):
    texts = [text for text in WITH_SPECIALS if not re.search(r"\d|[½²①Ⅻ]", text)]
    assert len(texts) > 12
    for text in texts:
        assert ids(smollm2, text) == ids(smollm2_of_transformers, text), text


def test_smollm2_cuts_digits_as_its_tokenizer_json_does(smollm2, smollm2_of_transformers):
    """transformers' GGUF reader knows no "smollm" and cuts as GPT-2 does: "7  77" differs. Here it
    gets the pre-tokenizer that SmolLM2's tokenizer.json has."""
    smollm2_of_transformers.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    for text in WITH_SPECIALS:
        assert ids(smollm2, text) == ids(smollm2_of_transformers, text), text
    assert [smollm2.decode([i]) for i in ids(smollm2, "7  77")] == ["7", "  ", "7", "7"]


def test_smollm2_known_ids(smollm2):
    question = [1780, 314, 260, 3575, 282, 4649, 47]
    assert ids(smollm2, "What is the capital of France?") == question
    assert ids(smollm2, "Hello") == [19556]
    assert ids(smollm2, "0123456789") == list(range(32, 42))
    assert ids(smollm2, "<|im_start|><|im_end|><|endoftext|>") == [1, 2, 0]
    assert (smollm2.bos_token_id, smollm2.eos_token_id) == (1, 2)
    assert (smollm2.unk_token_id, smollm2.pad_token_id) == (0, 2)
    assert len(smollm2) == smollm2.vocab_size == 49152


def test_smollm2_adds_nothing_by_itself(smollm2):
    assert smollm2("Hello")["input_ids"] == [19556]
    assert set(smollm2("Hello")) == {"input_ids", "attention_mask"}


def test_smollm2_round_trip(smollm2):
    for text in WITH_SPECIALS:
        assert smollm2.decode(ids(smollm2, text)) == text
    assert smollm2.decode(ids(smollm2, CHAT), skip_special_tokens=True) == "user\nHi assistant\n"


@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_chat_template_equals_jinja(smollm2, prompt):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(smollm2.chat_template)
    for messages in (MESSAGES, MESSAGES[1:]):
        expected = template.render(messages=messages, add_generation_prompt=prompt)
        text = smollm2.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert text == expected
        assert text.startswith("<|im_start|>system\n")
        tokens = smollm2.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=prompt, return_dict=False
        )
        assert tokens == ids(smollm2, text)


# Byte-level BPE


def vocab_and_merges():
    tokens, merges, _ = gguf_files.byte_level_vocab()
    return {t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]


@pytest.mark.parametrize(
    ("pre", "cls"),
    [("default", GPT2Tokenizer), ("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)],
)
def test_equals_the_models_tokenizer_class(tmp_path, pre, cls):
    vocab, merges = vocab_and_merges()
    theirs = cls(vocab=vocab, merges=merges)
    theirs.add_special_tokens({"extra_special_tokens": list(gguf_files.SPECIALS)})
    theirs.add_tokens([gguf_files.USER_DEFINED])
    ours = build(tmp_path, {"tokenizer.ggml.pre": pre})
    for text in WITH_SPECIALS:
        assert ids(ours, text) == ids(theirs, text), text


@pytest.mark.parametrize("pre", ["llama3", "llama-v3", "llama-bpe", "smaug-bpe", "tekken"])
def test_equals_transformers_gguf_reader(tmp_path, pre):
    ours = build(tmp_path, {"tokenizer.ggml.pre": pre})
    theirs = transformers_own(tmp_path / "tiny.gguf")
    for text in WITH_SPECIALS:
        assert ids(ours, text) == ids(theirs, text), text


@pytest.mark.parametrize("pre", PRES)
def test_every_known_family_loses_nothing(tmp_path, pre):
    tokenizer = build(tmp_path, {"tokenizer.ggml.pre": pre})
    for text in WITH_SPECIALS:
        expected = unicodedata.normalize("NFC", text) if splitting(pre, "").nfc else text
        assert tokenizer.decode(ids(tokenizer, text)) == expected


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'m", " 1234", " and", "  ", " 中文abc", "!?"]),
        ("llama-bpe", ["I", "'m", " ", "123", "4", " and", "  ", " 中文abc", "!?"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", " and", "  ", " 中文abc", "!?"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", " and", "  ", " 中文abc", "!?"]),
        ("tekken", ["I", "'m", " ", "1", "2", "3", "4", " and", "  ", " 中文abc", "!?"]),
        ("gpt-4o", ["I'm", " ", "123", "4", " and", "  ", " 中文abc", "!?"]),
        ("command-r", ["I", "'m", " ", "1", "2", "3", "4", " and", "  ", " 中文abc", "!?"]),
        ("glm4", ["I", "'m", " ", "123", "4", " and", "  ", " 中文abc", "!?"]),
        ("dbrx", ["I", "'m", " ", "123", "4", " and", "  ", " 中文abc", "!?"]),
        ("deepseek-llm", ["I", "'", "m", " ", "1234", " and", "   ", "中文", "abc", "!?"]),
        (
            "deepseek-coder",
            ["I", "'", "m", " ", *"1234", " and", "  ", " ", "中文", "abc", "!?"],
        ),
        ("deepseek-v3", ["I", "'m", " ", "123", "4", " and", "   ", "中文", "abc", "!?"]),
    ],
)
def test_where_text_is_cut(pre, pieces):
    text = "I'm 1234 and   中文abc!?"
    spelled = splitting(pre, "").pre_tokenizer(add_prefix_space=False).pre_tokenize_str(text)
    ends = [0]
    for _, (start, end) in spelled:
        assert start == ends[-1]
        ends.append(end)
    got = [text[a:b] for a, b in itertools.pairwise(ends)]
    assert got == pieces


def test_whole_words_win_over_merges_where_the_family_says_so(tmp_path):
    """Llama 3's ignore_merges: a word that is a token is that token, reachable or not."""
    tokens, merges, types = gguf_files.byte_level_vocab()
    metadata = {
        "tokenizer.ggml.tokens": [*tokens, "Zyzzyva"],
        "tokenizer.ggml.token_type": [*types, 1],
        "tokenizer.ggml.merges": merges,
    }
    for pre, whole in (("llama-bpe", True), ("tekken", True), ("qwen2", False)):
        tokenizer = build(tmp_path, metadata | {"tokenizer.ggml.pre": pre}, vocab=len(tokens) + 1)
        assert (ids(tokenizer, "Zyzzyva") == [len(tokens)]) is whole


def test_prefix_space_is_honoured_where_gpt2_has_it(tmp_path):
    space = {"tokenizer.ggml.add_space_prefix": True}
    assert ids(build(tmp_path, space), "The") == ids(build(tmp_path), " The")
    qwen = {"tokenizer.ggml.pre": "qwen2"}
    assert ids(build(tmp_path, space | qwen), "The") == ids(build(tmp_path, qwen), "The")


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path):
    tokenizer = build(tmp_path)
    text = "<|im_start|>a<tool>b<|im_end|>"
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=True) == "a<tool>b"
    user_id = tokenizer.convert_tokens_to_ids(gguf_files.USER_DEFINED)
    assert user_id == len(tokenizer) - 1 and user_id in ids(tokenizer, text)


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_eos_token": True}, [], [2]),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"pre": "llama-bpe"}, [1], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
)
def test_bos_and_eos(tmp_path, flags, before, after):
    tokenizer = build(tmp_path, {f"tokenizer.ggml.{k}": v for k, v in flags.items()})
    inner = ids(tokenizer, "Hello")
    assert tokenizer("Hello")["input_ids"] == before + inner + after
    assert tokenizer("Hello", "Hello")["input_ids"] == (before + inner + after) * 2
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (bool(before), bool(after))


def test_adding_a_bos_that_is_not_there(tmp_path):
    with pytest.raises(ModelLoadError, match=r"adds BOS, but tokenizer\.ggml\.bos_token_id"):
        build(
            tmp_path,
            {"tokenizer.ggml.add_bos_token": True},
            without=("tokenizer.ggml.bos_token_id",),
        )


def test_special_tokens_may_be_absent(tmp_path):
    roles = ("bos", "eos", "padding")
    tokenizer = build(tmp_path, without=tuple(f"tokenizer.ggml.{r}_token_id" for r in roles))
    assert tokenizer.bos_token is None and tokenizer.eos_token_id is None
    assert len(tokenizer) == len(gguf_files.byte_level_vocab()[0])


# SentencePiece BPE


def sentencepiece(text, prefix_space=True):
    """The definition, slowly: among neighbours whose union is a token, join the best-scored,
    leftmost first; what stays unknown becomes bytes. Special tokens cut the text first."""
    tokens, scores, types = gguf_files.spm_vocab()
    score = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == 1}
    index = {t: i for i, t in enumerate(tokens)}
    out = []
    for part in re.split("(<unk>|<s>|</s>|<tool>)", text):
        if (part in index and index[part] < 3) or part == "<tool>":
            out.append(index[part])
            continue
        spaced = (" " if prefix_space and part else "") + part
        symbols = list(spaced.replace(" ", "\u2581"))
        while True:
            joined = ["".join(pair) for pair in itertools.pairwise(symbols)]
            best = max((score[t] for t in joined if t in score), default=None)
            if best is None:
                break
            at = next(i for i, t in enumerate(joined) if score.get(t) == best)
            symbols[at : at + 2] = [joined[at]]
        for symbol in symbols:
            pieces = [symbol] if symbol in score else [f"<0x{b:02X}>" for b in symbol.encode()]
            out += [index[piece] for piece in pieces]
    return out


SPM_TEXTS = (*CORPUS, *gguf_files.SENTENCES, "<s>Hello</s> The capital<s>", "a<tool>b <tool> c")


@pytest.mark.parametrize("prefix_space", [True, False])
def test_sentencepiece_equals_its_definition(tmp_path, prefix_space):
    metadata = {} if prefix_space else {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = build(tmp_path, metadata, tokenizer="llama")
    for text in SPM_TEXTS:
        assert ids(tokenizer, text) == sentencepiece(text, prefix_space), text


def test_sentencepiece_equals_transformers(tmp_path):
    """Where text starts with a space or follows a special token, transformers' GGUF reader takes
    its newer convention, not Llama 2's and Mistral's (and llama.cpp's)."""
    ours = build(tmp_path, tokenizer="llama")
    theirs = transformers_own(tmp_path / "tiny.gguf")
    texts = [
        text for text in SPM_TEXTS if text and not text.startswith((" ", "<")) and "<t" not in text
    ]
    assert len(texts) > 15
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text


def test_sentencepiece_round_trip_and_bos(tmp_path):
    tokenizer = build(tmp_path, tokenizer="llama")
    for text in SPM_TEXTS[: len(CORPUS)]:
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == 1
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_sentencepiece_defaults(tmp_path):
    roles = ("bos", "eos", "unknown")
    left_out = tuple(f"tokenizer.ggml.{role}_token_id" for role in roles)
    tokenizer = build(tmp_path, tokenizer="llama", without=left_out)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    config = gguf_config.read_config(str(tmp_path / "tiny.gguf"))
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_sentencepiece_with_merges_in_the_file(tmp_path):
    merges = {"tokenizer.ggml.merges": ["\u2581 t", "h e"]}
    tokenizer = build(tmp_path, merges, tokenizer="llama")
    assert tokenizer.tokenize("the") == ["\u2581t", "he"]


# Chat templates


def test_chat_template_argument_wins(tmp_path):
    path = tmp_path / "tiny.gguf"
    gguf_files.write_model(path)
    assert build_tokenizer(str(path)).chat_template == gguf_files.CHAT_TEMPLATE
    tokenizer = build_tokenizer(str(path), chat_template="{{ messages[0].content }}!")
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "You are terse.!"


def test_several_chat_templates(tmp_path):
    tokenizer = build(
        tmp_path,
        {
            "tokenizer.chat_templates": ["tool_use"],
            "tokenizer.chat_template.tool_use": "tools: {{ messages[0].content }}",
        },
    )
    assert tokenizer.chat_template.keys() == {"default", "tool_use"}
    text = tokenizer.apply_chat_template(MESSAGES, chat_template="tool_use", tokenize=False)
    assert text == "tools: You are terse."


def test_no_chat_template(tmp_path):
    tokenizer = build(tmp_path, without=("tokenizer.chat_template",))
    assert tokenizer.chat_template is None


# Saved beside converted weights


@pytest.mark.parametrize(
    ("arch", "tokenizer", "pre"),
    [("llama", "gpt2", "smollm"), ("llama", "gpt2", "llama-bpe"), ("qwen2", "gpt2", "qwen2"),
     ("qwen3", "gpt2", "qwen2"), ("llama", "llama", "default")],
)  # fmt: skip
def test_saved_tokenizer_is_the_same(tmp_path, arch, tokenizer, pre):
    path = tmp_path / "tiny.gguf"
    gguf_files.write_model(path, arch, tokenizer=tokenizer, metadata={"tokenizer.ggml.pre": pre})
    ours = build_tokenizer(str(path))
    folder = tmp_path / "saved"
    ours.save_pretrained(folder)
    config = gguf_config.read_config(str(path))
    (folder / "config.json").write_text(json.dumps(config))
    again = AutoTokenizer.from_pretrained(folder)
    for text in WITH_SPECIALS:
        assert again(text)["input_ids"] == ours(text)["input_ids"], text
        assert again.decode(ids(ours, text)) == ours.decode(ids(ours, text))
    assert again.chat_template == ours.chat_template


# Refusals


def test_unknown_pre_tokenizer_lists_the_known(tmp_path):
    with pytest.raises(NotSupportedError, match=r"'falcon' is not supported.*gpt-2.*deepseek-v3"):
        build(tmp_path, {"tokenizer.ggml.pre": "falcon"})


def test_unknown_vocabulary_kind(tmp_path):
    with pytest.raises(NotSupportedError, match=r"'bert' is not supported.*gpt2.*llama"):
        build(tmp_path, {"tokenizer.ggml.model": "bert"})


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"tokenizer.ggml.merges": ["a b c"]}, "'a b c'"),
        ({"tokenizer.ggml.merges": ["Q X"]}, "do not fit"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "'a' at both 0 and 2"),
        ({"tokenizer.ggml.bos_token_id": 100000}, "bos_token_id=100000"),
    ],
)
def test_vocabularies_that_do_not_fit(tmp_path, pairs, message):
    with pytest.raises(ModelLoadError, match=message):
        build(tmp_path, pairs)


def test_scores_that_do_not_fit(tmp_path):
    with pytest.raises(ModelLoadError, match="scores has 1 entries"):
        build(tmp_path, {"tokenizer.ggml.scores": [1.0]}, tokenizer="llama")
