"""Tiny GGUF files, written with the gguf package's own writer.

    tensors = write_model(path, "qwen3", quantization=GGMLQuantizationType.Q8_0)

returns the tensors under their Hugging Face names, as they stood before quantization.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from converters.gguf_families import ONE_PLUS, PERMUTED
from converters.sources import TensorSource

SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "A quick brown fox jumps over the lazy dog while the sun goes down.",
    "def main():\n    return [i**2 for i in range(10)]\n\n\n"
    "if __name__ == '__main__':\n    main()\n",
    "It's what they'd call a test; we've 1234 of them, don't we?",
    "Größe, naïveté, 東京 and Ελλάδα are words too.",
)

CORPUS = (
    "",
    " ",
    "a",
    "Hello, world!",
    "The capital of France is Paris.",
    "  two leading, two trailing  ",
    "tabs\tand\nlines\r\n\r\n and   runs     of spaces\n\n\n   indented\n",
    "1 12 123 1234 12345 3.14159 1,000,000 x2y22  7  77",
    "I'm you're he'd WE'LL they've it's O'Neill",
    "naïve café Ångström ß Straße ΑΒΓ αβγ русский",
    "中文字符 日本語テキスト 한국어 עברית العربية हिन्दी ไทย",
    "e\u0301 decomposed, \u00e9 composed, \u1e9b\u0323, \ufb01 ligature, \u00a0nbsp, \u3000wide",
    "\U0001f642 \U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1eb\U0001f1f7 "
    "\U0001f44d\U0001f3fd",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; } // comment",
    "snake_case camelCase SCREAMING_CASE kebab-case foo.bar(baz)->qux::quux",
    '{"key": [1, 2.5, null], "other": "va\\"lue"}',
    "\x00\x01\x7f control",
    "½ ² ① Ⅻ ٣ ๓",
    "word" * 50,
)  # fmt: skip

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = "<tool>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_model(
    path: Path,
    arch: str = "llama",
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    hidden: int = 64,
    mlp: int = 96,
    layers: int = 2,
    vocab: int | None = None,
    tied: bool = False,
    biases: tuple[str, ...] | None = None,
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
    tokenizer: str | None = "gpt2",
    metadata: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """metadata: keys to add or replace, {arch} in them filled in; without: keys to leave out;
    extra: tensors to add under their GGUF names."""
    vocab = vocab or (len(byte_level_vocab()[0]) if tokenizer != "llama" else len(spm_vocab()[0]))
    if biases is None:
        biases = ("q_proj", "k_proj", "v_proj") if arch == "qwen2" else ()
    pairs: dict[str, Any] = {
        "general.name": f"tiny {arch}",
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": hidden,
        f"{arch}.block_count": layers,
        f"{arch}.feed_forward_length": mlp,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.vocab_size": vocab,
    }
    if arch in PERMUTED:
        pairs[f"{arch}.rope.dimension_count"] = head_dim
    pairs |= {None: {}, "gpt2": byte_level_pairs(), "llama": spm_pairs()}[tokenizer]
    pairs |= {key.format(arch=arch): value for key, value in (metadata or {}).items()}
    tensors = random_tensors(
        arch, heads, kv_heads, head_dim, hidden, mlp, layers, vocab, tied, biases
    )
    writer = GGUFWriter(str(path), arch)
    for key, value in pairs.items():
        if key not in without:
            add_pair(writer, key, value)
    for name, value in tensors.items():
        stored = value
        if arch in PERMUTED and name.split(".")[-2] in ("q_proj", "k_proj"):
            stored = permute(value, heads if "q_proj" in name else kv_heads)
        if arch in ONE_PLUS and "norm" in name:
            stored = 1 + value
        add_tensor(writer, gguf_name(name, arch), stored, quantization)
    for name, value in (extra or {}).items():
        add_tensor(writer, name, value, GGMLQuantizationType.F32)
    finish(writer)
    return tensors


def read(source: TensorSource, name: str) -> np.ndarray:
    """A tensor of a source, whole."""
    tensor = source.tensor(name)
    out = np.empty(tensor.shape, tensor.dtype)
    tensor.read_into(out)
    return out


def random_tensors(
    arch: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    mlp: int,
    layers: int,
    vocab: int,
    tied: bool,
    biases: tuple[str, ...],
) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        projections = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        for name, shape in projections.items():
            shapes[f"{at}.{name}.weight"] = shape
            if name.split(".")[1] in biases:
                shapes[f"{at}.{name}.bias"] = shape[:1]
        whole = arch == "olmo2"  # norms of q and k over all heads, none before products
        norms = ["input_layernorm"] * (not whole) + ["post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm"] * (arch in ONE_PLUS)
        norms += ["post_feedforward_layernorm"] * (whole or arch in ONE_PLUS)
        shapes |= {f"{at}.{name}.weight": (hidden,) for name in norms}
        if whole or arch in ("qwen3", "gemma3"):
            shapes[f"{at}.self_attn.q_norm.weight"] = (head_dim * (heads if whole else 1),)
            shapes[f"{at}.self_attn.k_norm.weight"] = (head_dim * (kv_heads if whole else 1),)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
        for name, shape in shapes.items()
    }


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the q and k projections of its llama architecture: each
    head's rows (first half, second half) become (first, second, first, second, ...)."""
    rows = values.shape[0] // heads
    order = [h * rows + half * rows // 2 + i for h in range(heads) for i in range(rows // 2)
             for half in range(2)]  # fmt: skip
    return values[order]


def gguf_name(name: str, arch: str = "llama") -> str:
    """llama.cpp's name, which for the norm behind attention depends on whether there are others."""
    if arch in (*ONE_PLUS, "olmo2"):
        name = name.replace("post_attention_layernorm", "post_attention_norm")
    for hf, short in (
        ("model.embed_tokens.", "token_embd."), ("model.norm.", "output_norm."),
        ("lm_head.", "output."), ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"),
        ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"), ("post_feedforward_layernorm", "post_ffw_norm"),
        ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
    ):  # fmt: skip
        name = name.replace(hf, short)
    return name


def add_tensor(
    writer: GGUFWriter, name: str, values: np.ndarray, kind: GGMLQuantizationType
) -> None:
    if values.ndim == 1:
        kind = GGMLQuantizationType.F32
    writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)


def add_pair(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level_vocab() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges ("a b") and token types of a small byte-level BPE vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    tokens, merges = _learned(backend)
    control, user = TokenType.CONTROL, TokenType.USER_DEFINED
    types = [control] * len(SPECIALS) + [TokenType.NORMAL] * len(tokens) + [user]
    return [*SPECIALS, *tokens, USER_DEFINED], merges, [int(kind) for kind in types]


def byte_level_pairs(pre: str = "gpt-2") -> dict[str, Any]:
    tokens, merges, types = byte_level_vocab()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def spm_vocab() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and token types, laid out as SentencePiece does for Llama 2: unk, BOS, EOS,
    256 bytes, merged pieces with falling scores, single characters last."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=240, show_progress=False)
    backend.train_from_iterator(SENTENCES[:2] + SENTENCES[3:], trainer)
    learned, _ = _learned(backend)
    pieces = [t for t in learned if len(t) > 1] + [t for t in learned if len(t) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, USER_DEFINED]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces) + [TokenType.USER_DEFINED]
    scores = [0.0] * 259 + [float(-i) for i in range(len(pieces))] + [0.0]
    return tokens, scores, [int(kind) for kind in types]


def spm_pairs() -> dict[str, Any]:
    tokens, scores, types = spm_vocab()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _learned(backend: Tokenizer) -> tuple[list[str], list[str]]:
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(merge) for merge in model["merges"]]
