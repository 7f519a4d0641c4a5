"""Checkpoints of models that take pictures: spellings, formats, and every way they can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from safetensors.numpy import load_file, save_file

import converters
from converters.load import open_source
from jaxserve import weights
from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models import registry
from jaxserve.models.config import ModelConfig
from jaxserve.parallel.rules import WHOLE
from tests import vision_models
from tests.checkpoints import make_checkpoint
from tests.marks import long_but
from tests.vision_models import FAMILIES

pytest.importorskip("torch")


@pytest.fixture(
    scope="module",
    params=long_but(FAMILIES, "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm", "llava"),
)
def saved(request, tmp_path_factory) -> Path:
    return Path(vision_models.make(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return Path(vision_models.make("qwen2_vl", tmp_path_factory.mktemp("qwen")))


def changed(origin: Path, folder: Path, tensors=lambda x: x, **config) -> str:
    """A copy with other tensors, and other keys of config.json; None takes one out."""
    shutil.copytree(origin, folder)
    file = folder / "model.safetensors"
    save_file(tensors(load_file(file)), file, metadata={"format": "pt"})
    hf = json.loads((folder / "config.json").read_text()) | config
    kept = {key: value for key, value in hf.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return str(folder)


def equal(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


def same(a: converters.LoadedModel, b: converters.LoadedModel) -> None:
    assert a.tower is not None
    assert b.tower is not None
    assert (a.config, a.tower.config) == (b.config, b.tower.config)
    equal(a.params, b.params)
    equal(a.tower.params, b.tower.params)


def test_decoder_and_tower_are_apart(saved):
    loaded = converters.load(str(saved))
    assert loaded.tower is not None
    assert list(loaded.params) == list(loaded.declaration.specs)
    assert list(loaded.tower.params) == list(loaded.tower.declaration.specs)
    assert not [path for path in loaded.params if path.startswith("tower")]
    stored = load_file(saved / "model.safetensors")
    name = next(
        name for name in stored if name.endswith(("patch_embed.proj.weight", "_embedding.weight"))
    )
    kernel = stored[name].reshape(len(stored[name]), -1).T
    np.testing.assert_array_equal(loaded.tower.params["patch_embed.kernel"], kernel)


def test_saved_again(saved, tmp_path):
    """As safetensors, under the names that Hugging Face wrote, and as Orbax."""
    loaded = converters.load(str(saved))
    converters.save(loaded, tmp_path / "safetensors", "safetensors")
    again = load_file(tmp_path / "safetensors" / "model.safetensors")
    stored = load_file(saved / "model.safetensors")
    assert again.keys() <= stored.keys()
    unused = {name for name in stored.keys() - again.keys() if "encoder.layers.2." not in name}
    assert all(".post_layernorm." in name or ".head." in name for name in unused)
    for name in again:
        # 1 is added to Gemma's norms, and taken away again
        rounded = 2e-7 if "gemma3" in str(saved) and name.endswith("norm.weight") else 0
        np.testing.assert_allclose(again[name], stored[name], rtol=0, atol=rounded, err_msg=name)
    converters.save(loaded, tmp_path / "orbax")
    same(converters.load(str(tmp_path / "orbax")), loaded)


def test_nothing_is_held_twice(qwen):
    before = sum(array.nbytes for array in jax.live_arrays())
    loaded = converters.load(str(qwen))
    held = sum(array.nbytes for array in jax.live_arrays()) - before
    assert held == sum(array.nbytes for array in loaded.everything().values())


def test_fusing_on_an_accelerator_gives_the_same(qwen, monkeypatch):
    """The path of GPUs, on the CPU's device: transposed and fused by XLA."""
    loaded = converters.load(str(qwen))
    monkeypatch.setattr("converters.convert.on_cpu", lambda sharding: False)
    same(converters.load(str(qwen)), loaded)


@pytest.mark.parametrize("way", ["host", "accelerator", "dummy"])
def test_mlps_are_padded_with_zeros(saved, way, monkeypatch):
    """To a multiple of 128: columns of the first product, gate and up each, rows of the second."""
    if way == "accelerator":
        monkeypatch.setattr("converters.convert.on_cpu", lambda sharding: False)
    kind = "dummy" if way == "dummy" else "auto"
    loaded = converters.load(str(saved), load_format=kind)
    assert loaded.tower is not None
    layer = {
        path.removeprefix("layers.0.mlp."): np.asarray(array)
        for path, array in loaded.tower.params.items()
        if path.startswith("layers.0.mlp.")
    }
    size, dim = loaded.tower.config.mlp_dim, loaded.tower.config.dim
    assert size % 128
    first, second = ("gate_up", "down") if "down.kernel" in layer else ("fc1", "fc2")
    sections = 2 if first == "gate_up" else 1
    kernel = layer[f"{first}.kernel"].reshape(dim, sections, 128)
    bias = layer[f"{first}.bias"].reshape(sections, 128)
    assert kernel[..., :size].all() and not kernel[..., size:].any()
    assert not bias[:, size:].any()
    assert layer[f"{second}.kernel"].shape == (128, dim)
    assert layer[f"{second}.kernel"][:size].all() and not layer[f"{second}.kernel"][size:].any()
    assert layer[f"{second}.bias"].shape == (dim,)


class TestSpellings:
    def test_qwen_before_transformers_5(self, qwen, tmp_path):
        """Text sizes at the top level, "mrope", and none of the newer prefixes."""
        hf = json.loads((qwen / "config.json").read_text())
        text = hf["text_config"]
        rope = text.pop("rope_parameters")
        old = {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
        text |= old | {"rope_theta": rope["rope_theta"], "model_type": "qwen2_vl"}
        path = changed(qwen, tmp_path / "old", text_config=None, **text)
        same(converters.load(path), converters.load(str(qwen)))

    @pytest.mark.parametrize(
        ("family", "prefixes"),
        [
            ("qwen2_vl", {"visual.": "model.visual.", "model.": "model.language_model."}),
            (
                "llava",
                {
                    "vision_tower.": "vision_tower.vision_model.",
                    "language_model.model.": "model.language_model.",
                    "language_model.lm_head.": "lm_head.",
                },
            ),
            (
                "llava",
                {
                    "vision_tower.": "model.vision_tower.",
                    "multi_modal_projector.": "model.multi_modal_projector.",
                },
            ),
        ],
    )
    def test_prefixes(self, family, prefixes, tmp_path):
        origin = Path(vision_models.make(family, tmp_path / "new"))

        def respell(tensors):
            renamed = {}
            for name, tensor in tensors.items():
                old = next((old for old in prefixes if name.startswith(old)), None)
                spelled = name if old is None else prefixes[old] + name.removeprefix(old)
                renamed[spelled] = tensor
            return renamed

        path = changed(origin, tmp_path / "old", respell)
        same(converters.load(path), converters.load(str(origin)))

    def test_two_spellings_of_one_tensor(self, qwen, tmp_path):
        name = "visual.patch_embed.proj.weight"
        path = changed(qwen, tmp_path / "m", lambda x: x | {f"model.{name}": x[name].copy()})
        with pytest.raises(ModelLoadError, match=r"two spellings of one tensor"):
            converters.load(path)

    def test_tied_in_either_config(self, qwen):
        for overrides in (
            {"tie_word_embeddings": True},
            {"text_config": {**read(qwen)["text_config"], "tie_word_embeddings": True}},
        ):
            loaded = converters.load(str(qwen), config_overrides=overrides)
            assert loaded.config.tie_word_embeddings
            assert "lm_head.embedding" not in loaded.params


def read(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_overrides_reach_the_text_config(qwen):
    loaded = converters.load(
        str(qwen), load_format="dummy", config_overrides={"max_position_embeddings": 99}
    )
    assert loaded.config.max_position_embeddings == 99


def test_dummy_weights_need_the_config_only(saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    loaded = converters.load(str(tmp_path), load_format="dummy", dtype="bfloat16")
    assert loaded.tower is not None
    for path, spec in loaded.tower.declaration.specs.items():
        array = loaded.tower.params[path]
        assert (array.shape, array.dtype) == (spec.shape, spec.dtype)
        assert path.endswith(".scale") == bool((np.asarray(array) == 1).all())


def test_quantization_leaves_towers_alone(qwen, tmp_path):
    plain = converters.load(str(qwen))
    loaded = converters.load(str(qwen), quantization="fp8")
    assert loaded.tower is not None
    assert loaded.params["layers.0.mlp.down.kernel"].dtype == "float8_e4m3fn"
    equal(loaded.tower.params, plain.tower.params)
    converters.save(loaded, tmp_path / "q")
    same(converters.load(str(tmp_path / "q")), loaded)


def test_all_mismatches_of_both_are_one_error(qwen, tmp_path):
    def spoil(tensors):
        del tensors["model.layers.3.mlp.up_proj.weight"], tensors["visual.merger.mlp.2.bias"]
        name = "visual.patch_embed.proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name][:, :, :1])
        return tensors | {"visual.head.weight": np.zeros(3, np.float32)}

    with pytest.raises(ModelLoadError) as found:
        converters.load(changed(qwen, tmp_path / "m", spoil))
    for part in (
        "model.layers.3.mlp.up_proj.weight",
        "visual.merger.mlp.2.bias",
        "visual.patch_embed.proj.weight is [32, 3, 1, 4, 4], should be [32, 3, 2, 4, 4]",
        "visual.head.weight",
        "hidden_size=64",
        "tower: patch_size=4",
    ):
        assert part in str(found.value)


def test_orbax_mismatches_of_both_are_one_error(qwen, tmp_path):
    converters.save(converters.load(str(qwen)), tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "params" / "tower.merger.mlp.fc1.bias")
    shutil.rmtree(tmp_path / "m" / "params" / "layers.1.mlp.down.kernel")
    with pytest.raises(ModelLoadError) as found:
        converters.load(str(tmp_path / "m"))
    assert "missing tower.merger.mlp.fc1.bias" in str(found.value)
    assert "missing layers.1.mlp.down.kernel" in str(found.value)


def test_a_gguf_file_has_no_tower(tmp_path):
    with pytest.raises(NotSupportedError, match=r"a GGUF file holds no tower"):
        open_source(tmp_path / "m.gguf", "gguf", tower=True)


def test_a_text_model_has_none(tmp_path):
    loaded = converters.load(make_checkpoint(tmp_path, tokenizer=False))
    assert loaded.tower is None
    assert registry.tower_config_from_hf(loaded.hf_config, loaded.config) is None


def test_each_device_has_all_of_a_tower(qwen):
    """Also where KV heads are fewer than devices, and those of the decoder are cut otherwise."""
    loaded = converters.load(str(qwen))
    mesh = AbstractMesh((1, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    where = weights.placement(loaded.config, mesh)
    assert where("layers.0.attn.qkv.kernel").spec != WHOLE
    assert loaded.tower is not None
    assert {where(f"tower.{path}").spec for path in loaded.tower.params} == {WHOLE}


def changes(family: str, **keys) -> tuple[ModelConfig, dict]:
    given = FAMILIES[family]
    hf = {**given.config, "architectures": [f"{given.name}ForConditionalGeneration"]}
    for key, value in keys.items():
        hf[key] = {**hf[key], **value} if isinstance(value, dict) else value
    return registry.config_from_hf(hf), hf


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("qwen2_vl", {"vision_config": {"depth": 0}}, r"vision_config: config.json: depth must be"),
        ("qwen2_vl", {"vision_config": {"hidden_size": 32}}, r"hidden_size=32 must be the decoder"),
        ("qwen2_vl", {"vision_config": {"num_heads": 3}}, r"width 32 and num_heads=3"),
        ("qwen2_vl", {"text_config": {"rope_parameters": None}}, r"lack mrope_section"),
        (
            "qwen2_vl",
            {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 4]}}},
            r"mrope_section=\[2, 3, 4\] must sum to 8, half of .* head_dim=16",
        ),
        ("qwen2_vl", {"text_config": {"model_type": "llama"}}, r"model_type='llama' is not supp"),
        ("qwen2_5_vl", {"vision_config": {"fullatt_block_indexes": [4]}}, r"layers below 4"),
        ("qwen2_5_vl", {"vision_config": {"window_size": 4}}, r"window_size=4 is less than"),
        ("qwen3_vl", {"vision_config": {"num_position_embeddings": 60}}, r"60 is not a square"),
        ("qwen3_vl", {"text_config": {"num_hidden_layers": 1}}, r"num_hidden_layers=1"),
        ("smolvlm", {"scale_factor": 3}, r"scale_factor=3 does not divide the 8"),
        ("smolvlm", {"vision_config": {"patch_size": 5}}, r"patch_size=5 must divide image_size"),
        ("llava", {"vision_feature_layer": [1, 2]}, r"vision_feature_layer=\[1, 2\] is not"),
        ("llava", {"vision_feature_select_strategy": "full"}, r"strategy='full' is not"),
        ("llava", {"vision_config": {"model_type": "pixtral"}}, r"model_type='pixtral' is not"),
    ],
)
def test_configs_that_cannot_be(family, keys, message):
    with pytest.raises((ModelLoadError, NotSupportedError), match=message):
        decoder, hf = changes(family, **keys)
        registry.tower_config_from_hf(hf, decoder)


def test_configs_that_leave_out_what_everybody_knows():
    """LLaVA-1.5's own file, but for keys of no meaning."""
    hf = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
        "vision_feature_layer": -2,
    }
    config = registry.config_from_hf(hf)
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (4096, 11008, 32)
    assert (config.vocab_size, config.head_dim, config.dtype) == (32064, 128, "float16")
    tower = registry.tower_config_from_hf(hf, config)
    assert tower is not None
    assert (tower.unit, tower.patches_per_token, tower.width) == (576, 1, 4096)
