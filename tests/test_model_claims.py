"""What a model's config claims, against sense: types, ranges, contexts, end tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import converters
import jaxserve
from converters.cli import main as convert
from converters.gguf_config import read_config
from jaxserve.api.startup import tokenizer_eos
from jaxserve.config import EngineConfig
from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import config_from_hf
from jaxserve.server_args import ServerArgs
from tests import gguf_files
from tests.checkpoints import make_checkpoint, make_config
from tests.machines import CPU

NAN, INF = float("nan"), float("inf")
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}


def config_of(family: str = "llama", **overrides) -> ModelConfig:
    return config_from_hf(make_config(family, **overrides))


class TestContext:
    """Tokens of context, of a model that states 64."""

    @pytest.mark.parametrize(
        ("scaling", "context"),
        [
            ({"rope_type": "linear", "factor": 4.0}, 256),
            ({"rope_type": "dynamic", "factor": 4.0}, 256),
            ({"type": "linear", "factor": 2.5}, 160),
            (YARN, 256),
            (YARN | {"original_max_position_embeddings": None}, 256),
            (YARN | ORIGINAL, 64),
            (YARN | ORIGINAL | {"factor": None}, 64),
            (LLAMA3, 64),
            (LLAMA3 | ORIGINAL, 64),
            ({"rope_type": "default", "factor": 4.0}, 64),
            (None, 64),
        ],
    )
    @pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
    def test_scaled(self, key, scaling, context):
        config = config_of(max_position_embeddings=64, **{"rope_parameters": None, key: scaling})
        assert (config.context_length, config.max_position_embeddings) == (context, 64)

    def test_the_first_key_that_is_present_counts(self):
        keys = ["max_sequence_length", "seq_length", "max_seq_len", "model_max_length"]
        stated: dict[str, Any] = {key: 100 + i for i, key in enumerate(keys)}
        for i, key in enumerate(keys):
            assert config_of(**stated).context_length == 100 + i
            stated[key] = None
        assert config_of(**stated).context_length == 1024
        linear = {"rope_type": "linear", "factor": 2.0}
        assert config_of(max_seq_len=50, rope_scaling=linear).context_length == 100

    def test_of_a_gguf_file(self, tmp_path):
        path = tmp_path / "tiny.gguf"
        scaling = {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": 4.0}
        gguf_files.write_model(path, metadata=scaling)
        assert config_from_hf(read_config(str(path))).context_length == 2048

    def test_more_than_can_be_numbered(self):
        scaling = {"rope_type": "linear", "factor": 1e30}
        with pytest.raises(ModelLoadError, match=r"max_position_embeddings=1024.*factor=1e\+30"):
            config_of(rope_scaling=scaling)

    def test_a_longer_option_warns_and_is_taken(self):
        model = config_of(max_position_embeddings=64, rope_scaling=YARN)
        within = EngineConfig.resolve(ServerArgs("x", context_length=256), model, CPU, 0)
        assert within.context_length == 256
        with pytest.warns(UserWarning, match="context_length=257 is more than the model's 256 tok"):
            beyond = EngineConfig.resolve(ServerArgs("x", context_length=257), model, CPU, 0)
        assert beyond.context_length == 257

    def test_a_longer_option_works(self, tiny_models):
        """A prompt of 100 tokens, of a model that states 64."""
        path = tiny_models("llama", max_position_embeddings=64)
        with pytest.warns(UserWarning, match="context_length=128") as caught:
            engine = jaxserve.Engine(path, context_length=128, skip_tokenizer_init=True)
        with engine:
            result = engine.generate(
                input_ids=[*range(5, 105)], sampling_params={"max_new_tokens": 2}
            )
        assert result["meta_info"]["prompt_tokens"] == 100
        assert caught[0].filename == __file__


BAD_VALUES = {
    "rms_norm_eps": [NAN, INF, -1e-6, 1e39, 10**400, "small", True, [1e-6]],
    "rope_theta": [0, NAN, -1.0, 0.5, 1e39, 10**400, "10000", {}],
    "tie_word_embeddings": ["false", 1, [False]],
    "attention_bias": ["no"],
    "mlp_bias": [0],
    "head_dim": [0, "16", 1.5],
    "vocab_size": [True, 2**31, 10**400, "512"],
    "num_hidden_layers": [0, 10**9, 20_000, 2.0],
    "max_position_embeddings": [0, 2**31, 1e3, "1024"],
    "model_max_length": [-1, 1e30],
    "eos_token_id": ["2", 2.0, [[1, 2]], [1, "2"], {"a": 1}, True],
    "bos_token_id": ["<s>", [1.5], [[1]]],
    "architectures": ["LlamaForCausalLM", 3, [3], {"a": 1}],
    "hidden_act": [3, ["silu"]],
    "dtype": [16, ["float32"]],
    "rope_scaling": ["linear", 4, [4.0]],
    "rope_parameters": ["default", [1]],
    "quantization_config": ["awq", [1], 4],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in BAD_VALUES.items() for v in vs],
                         ids=lambda x: str(x)[:12])  # fmt: skip
def test_a_value_of_no_sense_is_refused_with_its_key(key, value, tmp_path):
    """NaN and wrong types in config.json; never anything but our error, and a short one."""
    config = make_config("llama", **{key: value})
    if key == "rope_theta":
        config["rope_parameters"] = None
    Path(tmp_path / "config.json").write_text(json.dumps(make_config()))
    with pytest.raises(ModelLoadError) as error:
        converters.load(str(tmp_path), load_format="dummy", config_overrides=config)
    message = str(error.value)
    assert key in message and str(tmp_path) in message and len(message) < 1000


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("mistral", {"sliding_window": "4096"}, "sliding_window"),
        ("mistral", {"sliding_window": [16]}, "sliding_window"),
        ("qwen2", {"use_sliding_window": "false"}, "use_sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 1.5}, "sliding_window"),
        ("qwen3", {"max_window_layers": "28"}, "max_window_layers"),
        ("qwen3", {"layer_types": 2}, "layer_types"),
        ("qwen3", {"layer_types": [["full_attention"], "full_attention"]}, "layer_types"),
        ("qwen3", {"attention_bias": "yes"}, "attention_bias"),
    ],
)  # fmt: skip
def test_a_familys_own_keys(family, changes, key):
    with pytest.raises(ModelLoadError, match=key):
        config_of(family, **changes)


def test_what_a_message_shows_is_short(tmp_path):
    Path(tmp_path / "config.json").write_text(json.dumps(make_config("qwen3")))
    long = {"dtype": "x" * 10**6, "hidden_act": "x" * 10**6, "layer_types": ["x"] * 10**5}
    for key, value in long.items():
        with pytest.raises(NotSupportedError, match=key) as error:
            converters.load(str(tmp_path), load_format="dummy", config_overrides={key: value})
        assert len(str(error.value)) < 1000


SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": LLAMA3 | ORIGINAL,
    "yarn": YARN | ORIGINAL | {
        "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.2, "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
}  # fmt: skip
MAY_BE_ZERO = ("low_freq_factor", "mscale", "mscale_all_dim")


class TestRoPE:
    """Numbers of a RoPE scaling that would kill the first request, or make nonsense of it."""

    @pytest.mark.parametrize("bad", [-1, NAN, INF, -INF, 1e39, 10**400, "x", [2.0], True])
    @pytest.mark.parametrize("kind", SCALINGS)
    def test_every_number_of_every_type_is_checked(self, kind, bad):
        for key in SCALINGS[kind].keys() - {"rope_type"}:
            scaling = SCALINGS[kind] | {"rope_type": kind, key: bad}
            with pytest.raises(ModelLoadError, match=f"config.json: {key} must be .*, got "):
                config_of(rope_scaling=scaling)

    @pytest.mark.parametrize("kind", SCALINGS)
    def test_zero_only_where_it_means_something(self, kind):
        for key in SCALINGS[kind].keys() - {"rope_type"}:
            scaling = SCALINGS[kind] | {"rope_type": kind, key: 0}
            if key in MAY_BE_ZERO:
                config_of(rope_scaling=scaling)
                continue
            with pytest.raises(ModelLoadError, match=f"{key} must be .*, got 0"):
                config_of(rope_scaling=scaling)

    def test_numbers_that_do_not_go_together(self):
        yarn, llama3 = SCALINGS["yarn"], SCALINGS["llama3"]
        for scaling, key in (
            (yarn | {"beta_slow": 40.0}, "beta_fast"),
            (yarn | {"truncate": "yes"}, "truncate"),
            (yarn | {"rope_theta": 1.0}, "rope_theta"),
            (llama3 | {"high_freq_factor": 1.0}, "high_freq_factor"),
            (llama3 | {"high_freq_factor": 1.0 + 1e-12}, "high_freq_factor"),
        ):
            with pytest.raises(ModelLoadError, match=f"{key} must be"):
                config_of(rope_scaling=scaling)
        with pytest.raises(ModelLoadError, match="head_dim=2"):
            config_of(head_dim=2, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
        with pytest.raises(NotSupportedError, match="by kind of layer"):
            config_of(rope_parameters={"full_attention": {"rope_theta": 1e6}})

    @pytest.mark.parametrize(
        ("key", "value", "named"),
        [
            ("rope.scaling.yarn_beta_fast", -1.0, "beta_fast"),
            ("rope.scaling.yarn_attn_factor", NAN, "attention_factor"),
            ("rope.scaling.original_context_length", 0, "original_max_position_embeddings"),
            ("rope.freq_base", NAN, "freq_base"),
            ("attention.layer_norm_rms_epsilon", -1.0, "rms_norm_eps"),
            ("attention.layer_norm_rms_epsilon", NAN, "rms_norm_eps"),
        ],
    )
    def test_of_a_gguf_file(self, tmp_path, key, value, named):
        path = tmp_path / "tiny.gguf"
        scaling = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
        gguf_files.write_model(path, "qwen2", metadata=scaling | {f"qwen2.{key}": value})
        with pytest.raises(ModelLoadError, match=f"tiny.gguf.*{named} must be .*, got "):
            converters.load(str(path))


class TestEnds:
    """End tokens of a GGUF file: those that it names, and control tokens that are known as ends."""

    @staticmethod
    def write(path: Path, **kinds: int) -> None:
        """kinds: token type by text, of tokens beside the usual 384."""
        pairs = gguf_files.byte_level_pairs()
        pairs["tokenizer.ggml.tokens"] += list(kinds)
        pairs["tokenizer.ggml.token_type"] += list(kinds.values())
        gguf_files.write_model(path, metadata=pairs, vocab=384 + len(kinds))

    def test_of_a_qwen(self, tmp_path):
        """eos is <|im_end|> (2); <|endoftext|> (0) ends too, <|im_start|> (1) does not."""
        self.write(tmp_path / "a.gguf")
        assert read_config(str(tmp_path / "a.gguf"))["eos_token_id"] == [2, 0]
        loaded = converters.load(str(tmp_path / "a.gguf"))
        assert loaded.eos_token_ids == (2, 0)

    def test_names_of_llama_cpp_if_they_are_control_tokens(self, tmp_path):
        control, normal, user = 3, 1, 4
        ends = ["<|eot_id|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|eom_id|>",
                "<EOT>"]  # fmt: skip
        self.write(tmp_path / "a.gguf", **dict.fromkeys(ends, control), **{"<other>": control})
        assert read_config(str(tmp_path / "a.gguf"))["eos_token_id"] == [2, 0, *range(384, 391)]
        self.write(tmp_path / "b.gguf", **{"<|eot_id|>": normal, "<|eom_id|>": user})
        assert read_config(str(tmp_path / "b.gguf"))["eos_token_id"] == [2, 0]
        tokenizer = converters.load_tokenizer(str(tmp_path / "b.gguf"))
        assert tokenizer_eos(tokenizer) == {2}

    def test_the_converter_writes_them_all(self, tmp_path):
        self.write(tmp_path / "a.gguf", **{"<|eot_id|>": 3})
        assert convert([str(tmp_path / "a.gguf"), str(tmp_path / "out")]) == 0
        for name in ("config.json", "generation_config.json"):
            written = json.loads((tmp_path / "out" / name).read_text())
            assert written["eos_token_id"] == [2, 0, 384]
        assert converters.load(str(tmp_path / "out")).eos_token_ids == (2, 0, 384)

    def test_ids_outside_the_vocabulary_are_left_out_with_a_warning(self, tmp_path, caplog):
        path = make_checkpoint(
            tmp_path, tokenizer=False, eos_token_id=[-1, 2, 512], bos_token_id=-1
        )
        Path(path, "generation_config.json").write_text('{"eos_token_id": [3, 9999]}')
        with caplog.at_level(logging.WARNING, logger="jaxserve"):
            loaded = converters.load(path)
        assert (loaded.eos_token_ids, loaded.config.bos_token_id) == ((2, 3), None)
        assert "eos_token_id=[-1, 2, 512]" in caplog.text and "9999" in caplog.text
        Path(path, "generation_config.json").write_text('{"eos_token_id": [[3]]}')
        with pytest.raises(ModelLoadError, match=r"generation_config\.json: eos_token_id must be"):
            converters.load(path)
