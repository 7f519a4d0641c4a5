"""Weight-only quantization from the rounding to the engine's output, and fp8 KV pages."""

from __future__ import annotations

import dataclasses
import functools
import json
import tracemalloc
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import converters
import jaxserve
from converters import cli
from converters.load import LoadedModel
from jaxserve.cache import pool
from jaxserve.errors import InvalidRequestError, ModelLoadError, NotSupportedError
from jaxserve.models import registry
from jaxserve.models.dense import DenseOps, split_heads
from jaxserve.models.quantization import SCHEMES, kernel_dtype, quantize, round_to, step_of
from tests import gguf_files
from tests.checkpoints import (
    FAMILIES,
    LLAMA_LIKE,
    SOME,
    by_kv_head,
    make_checkpoint,
    make_config,
    make_weights,
    separate,
    write_weights,
)
from tests.cpu_devices import on_cpu_devices
from tests.machines import GPU
from tests.marks import long, long_but

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
ROOT = Path(__file__).parent.parent
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = {"fp8": 448.0, "w8a16_int8": 127.0}
both = pytest.mark.parametrize("scheme", SCHEMES)


def quantized_by_hand(weights: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """[in, out] -> kernel in float64, scale; the definition, channel by channel."""
    kernel, scale = np.zeros(weights.shape), np.ones(weights.shape[1])
    for column, values in enumerate(weights.T.astype(np.float64)):
        largest = np.abs(values).max()
        if largest:
            scale[column] = largest / LARGEST[scheme]
        exact = values / scale[column]
        kernel[:, column] = np.rint(exact) if scheme == "w8a16_int8" else exact.astype(E4M3)
    return kernel, scale


def assert_is_quantized(kernel, scale, weights: np.ndarray, scheme: str) -> None:
    """kernel, scale are `weights` by the definition. A number that lies between two steps to within
    float32's precision may be rounded to either: those are few."""
    kernel, scale = np.asarray(kernel), np.asarray(scale)
    assert (kernel.dtype, scale.dtype) == (SCHEMES[scheme], np.float32)
    assert (kernel.shape, scale.shape) == (weights.shape, weights.shape[1:])
    kernel, weights = (x.reshape(len(x), -1) for x in (kernel, weights))
    scale = scale.reshape(-1)
    expected, steps = quantized_by_hand(weights, scheme)
    np.testing.assert_allclose(scale, steps, rtol=1e-6)
    assert (kernel.astype(np.float64) != expected).mean() < 1e-2
    assert_close(kernel, scale, weights, scheme)


def assert_close(kernel, scale, weights: np.ndarray, scheme: str) -> None:
    """The error of each element: half a step of int8; of e4m3, half of its last of three bits, or
    half of its smallest number."""
    weights, scale = weights.astype(np.float64), np.asarray(scale).astype(np.float64)
    error = np.abs(np.asarray(kernel).astype(np.float64) * scale - weights)
    bound = np.broadcast_to(scale / 2, weights.shape)
    if scheme == "fp8":
        bound = np.maximum(np.abs(weights) * 2.0**-4, scale * 2.0**-10)
    assert (error <= bound * (1 + 1e-5)).all()


class TestRounding:
    @both
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_against_the_definition_and_the_bounds(self, scheme, dtype):
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((96, 40)).astype(getattr(ml_dtypes, dtype, dtype))
        weights *= np.exp2(rng.integers(-8, 8, 40)).astype(weights.dtype)
        kernel, scale = quantize(jnp.asarray(weights), SCHEMES[scheme])
        assert_is_quantized(kernel, scale, weights, scheme)

    @both
    def test_numpy_gives_the_same_bits(self, scheme):
        weights = np.random.default_rng(1).standard_normal((300, 50)).astype(np.float32)
        kernel, scale = quantize(jnp.asarray(weights), SCHEMES[scheme])
        steps = step_of(np.abs(weights).max(axis=0), SCHEMES[scheme], np)
        np.testing.assert_array_equal(scale, steps)
        values = round_to(weights, steps, SCHEMES[scheme], np)
        assert values.tobytes() == np.asarray(kernel).tobytes()

    @both
    def test_extremes(self, scheme):
        """The largest of a channel becomes the largest number, whatever its size; none becomes NaN
        or leaves [-127, 127]; channels of zeros, and of next to nothing, are zeros of scale 1."""
        column = np.array([1.0, -1.0, 0.3, 0.0], np.float32)
        sizes = np.array([1, 1e-25, 3e37, 448, 0.007, 7.7e-31, 0, 1e-38], np.float32)
        weights = column[:, None] * sizes
        # many mantissas of the largest, which is 448 * (1 + eps) for some
        mantissas = np.random.default_rng(0).uniform(1, 2, 200).astype(np.float32)
        weights = np.concatenate([weights, column[:, None] * mantissas], axis=1)
        kernel, scale = (np.asarray(x) for x in quantize(jnp.asarray(weights), SCHEMES[scheme]))
        values = kernel.astype(np.float32)
        live = sizes > 1e-30
        assert np.isfinite(values).all() and np.isfinite(scale).all()
        assert np.abs(values).max() == LARGEST[scheme] and values.min() == -LARGEST[scheme]
        most = np.concatenate([live, np.ones(200, bool)])
        assert (values[0, most] == LARGEST[scheme]).all()
        assert (values[1, most] == -LARGEST[scheme]).all()
        assert (values[:, ~most] == 0).all() and (scale[~most] == 1).all()
        assert (values[3] == 0).all()

    def test_ties_go_to_even(self):
        halves = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 200.0, -200.0], np.float32)
        rounded = round_to(jnp.asarray(halves), np.float32(1), SCHEMES["w8a16_int8"])
        assert rounded.tolist() == [0, 2, 2, 0, -2, 126, 127, -127]
        between = np.array([17.0, 19.0, 430.0, 465.0, 1e9, -1e9], np.float32)
        rounded = round_to(jnp.asarray(between), np.float32(1), E4M3)
        assert rounded.astype(np.float32).tolist() == [16, 20, 416, 448, 448, -448]

    @pytest.mark.parametrize("bad", [np.inf, np.nan])
    @both
    def test_infinity_and_nan_show_in_the_scale(self, scheme, bad):
        weights = np.ones((4, 3), np.float32)
        weights[2, 1] = bad
        _, scale = quantize(jnp.asarray(weights), SCHEMES[scheme])
        assert np.isfinite(np.asarray(scale)).tolist() == [True, False, True]

    def test_unknown_scheme(self):
        with pytest.raises(NotSupportedError, match=r"quantization='int4'.*fp8, w8a16_int8"):
            kernel_dtype("int4")


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_declared_parameters(family, scheme):
    config = registry.config_from_hf(make_config(family, tie_word_embeddings=family == "qwen2"))
    plain = registry.declare(config, "bfloat16")
    quantized = registry.declare(config, "bfloat16", scheme)
    assert (plain.scales, plain.quantization, quantized.quantization) == ({}, None, scheme)
    kernels = [path for path in plain.specs if path.endswith(".kernel")]
    assert len(kernels) == 8 and list(quantized.scales) == kernels
    assert quantized.specs.keys() == plain.specs.keys() | set(quantized.scales.values())
    for path, spec in plain.specs.items():
        other = quantized.specs[path]
        dtype = SCHEMES[scheme] if path in kernels else spec.dtype
        assert (other.shape, other.dtype) == (spec.shape, dtype)
    for path, scale in quantized.scales.items():
        spec = quantized.specs[scale]
        assert (spec.shape, spec.dtype) == (plain.specs[path].shape[1:], np.float32)


def same(a: LoadedModel, b: LoadedModel) -> None:
    assert list(a.params) == list(b.params) == list(a.declaration.specs)
    for path, spec in a.declaration.specs.items():
        one, other = np.asarray(a.params[path]), np.asarray(b.params[path])
        assert (one.shape, one.dtype) == (spec.shape, spec.dtype)
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), path


def hf_kernels(folder: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Layer 1's kernels [in, out] in the checkpoint's numbers."""
    config = json.loads((folder / "config.json").read_text())
    tensors = separate(config, make_weights(config, dtype=dtype))

    def kernel(name: str) -> np.ndarray:
        return tensors[f"model.layers.1.{name}_proj.weight"].T

    return {
        "attn.qkv": by_kv_head(
            *(kernel(f"self_attn.{x}") for x in "qkv"), kv_heads=config["num_key_value_heads"]
        ),
        "attn.o": kernel("self_attn.o"),
        "mlp.gate_up": np.stack([kernel("mlp.gate"), kernel("mlp.up")], axis=1),
        "mlp.down": kernel("mlp.down"),
    }


class TestLoading:
    @both
    @pytest.mark.parametrize("family", long_but(SOME, *LLAMA_LIKE))
    def test_safetensors(self, family, scheme, tmp_path):
        """From the checkpoint's own numbers: bfloat16 here, whatever the engine computes in."""
        path = make_checkpoint(tmp_path, family, dtype="bfloat16", tokenizer=False, shards=2)
        loaded = converters.load(path, dtype="float16", quantization=scheme)
        assert loaded.declaration.quantization == scheme
        for name, weights in hf_kernels(tmp_path, "bfloat16").items():
            kernel, scale = (loaded.params[f"layers.1.{name}.kernel{x}"] for x in ("", "_scale"))
            assert_is_quantized(kernel, scale, weights, scheme)
        plain = converters.load(path, dtype="float16")
        for name, array in plain.params.items():
            if not name.endswith(".kernel"):
                assert np.asarray(array).tobytes() == np.asarray(loaded.params[name]).tobytes()

    @both
    def test_gguf(self, scheme, tmp_path):
        file = tmp_path / "tiny.gguf"
        written = gguf_files.write_model(file)
        loaded = converters.load(str(file), quantization=scheme)
        down = written["model.layers.1.mlp.down_proj.weight"].T
        kernel = loaded.params["layers.1.mlp.down.kernel"]
        assert_is_quantized(kernel, loaded.params["layers.1.mlp.down.kernel_scale"], down, scheme)
        converters.save(converters.load(str(file)), tmp_path / "hf", "safetensors")
        same(loaded, converters.load(str(tmp_path / "hf"), quantization=scheme))

    @both
    def test_orbax(self, scheme, tmp_path):
        path = make_checkpoint(tmp_path / "hf", "qwen2", dtype="bfloat16", tokenizer=False)
        converters.save(converters.load(path, dtype="bfloat16"), tmp_path / "orbax")
        expected = converters.load(path, quantization=scheme)
        same(expected, converters.load(str(tmp_path / "orbax"), quantization=scheme))

    @both
    def test_on_an_accelerator(self, scheme, tmp_path, monkeypatch):
        """The path of GPUs, on the CPU's device, gives the bits of the host's."""
        path = make_checkpoint(tmp_path / "hf", dtype="bfloat16", tokenizer=False)
        converters.save(converters.load(path, dtype="bfloat16"), tmp_path / "orbax")
        expected = converters.load(path, dtype="bfloat16", quantization=scheme)
        for module in ("convert", "orbax_format"):
            monkeypatch.setattr(f"converters.{module}.on_cpu", lambda sharding: False)
        for folder in (path, str(tmp_path / "orbax")):
            same(expected, converters.load(folder, dtype="bfloat16", quantization=scheme))

    @both
    def test_dummy_weights_are_the_same_draws(self, scheme, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(make_config("qwen3")))
        options = {"load_format": "dummy", "dtype": "float32", "seed": 3}
        plain = converters.load(str(tmp_path), **options).params
        loaded = converters.load(str(tmp_path), quantization=scheme, **options)
        for path, array in plain.items():
            if path in loaded.declaration.scales:
                kernel = loaded.params[path]
                scale = loaded.params[loaded.declaration.scales[path]]
                assert_is_quantized(kernel, scale, np.asarray(array), scheme)
            else:
                np.testing.assert_array_equal(array, loaded.params[path])

    def test_one_program_per_shape(self, tmp_path, monkeypatch):
        from converters import dummy

        made = []
        program = dummy._program
        monkeypatch.setattr(dummy, "_program", lambda *kind: made.append(kind[0]) or program(*kind))
        (tmp_path / "config.json").write_text(json.dumps(make_config(num_hidden_layers=6)))
        converters.load(str(tmp_path), load_format="dummy", quantization="fp8")
        assert sorted(made) == [(64, 2, 128), (64, 64), (64, 128), (128, 64), (512, 64)]

    @pytest.mark.parametrize("host", [True, False])
    def test_infinity_and_nan(self, host, tmp_path, monkeypatch):
        path = make_checkpoint(tmp_path / "hf", tokenizer=False)
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        tensors = make_weights(config)
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = np.nan
        write_weights(tmp_path / "hf", tensors)
        with monkeypatch.context() as unchecked:  # folders that were written by something else
            unchecked.setattr("converters.finite.all_finite", lambda block: True)
            converters.save(converters.load(path), tmp_path / "orbax")
        if not host:
            for module in ("convert", "orbax_format"):
                monkeypatch.setattr(f"converters.{module}.on_cpu", lambda sharding: False)
        for folder, name in ((path, "up_proj.weight"), (str(tmp_path / "orbax"), "gate_up.kernel")):
            with pytest.raises(ModelLoadError, match=rf"layers\.1\.mlp\.{name} cannot be"):
                converters.load(folder, quantization="fp8")

    def test_host_memory(self, tmp_path, monkeypatch):
        """The parameters and little else: no float copy of a kernel."""
        monkeypatch.setattr("converters.shards._MAPPED", 1 << 62)  # tracemalloc sees no mappings
        path = make_checkpoint(
            tmp_path, tokenizer=False, hidden_size=512, intermediate_size=4096, num_hidden_layers=1
        )
        converters.load(path, quantization="fp8")
        tracemalloc.start()
        loaded = converters.load(path, quantization="fp8")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        sizes = {name: array.nbytes for name, array in loaded.params.items()}
        gate_up = sizes["layers.0.mlp.gate_up.kernel"]
        assert gate_up == 1 << 22
        assert sum(sizes.values()) <= peak < sum(sizes.values()) + gate_up // 2

    def test_progress_counts_a_kernel_and_its_scale_as_one(self, tmp_path):
        path = make_checkpoint(tmp_path, tokenizer=False)
        plain, quantized = [], []
        converters.load(path, progress=lambda *done: plain.append(done))
        converters.load(path, quantization="fp8", progress=lambda *done: quantized.append(done))
        assert plain == quantized

    def test_unknown_scheme(self, tmp_path):
        path = make_checkpoint(tmp_path, tokenizer=False)
        with pytest.raises(NotSupportedError, match=r"quantization='int4' is not supported"):
            converters.load(path, quantization="int4")


@pytest.fixture(scope="module", params=list(SCHEMES))
def saved(request, tmp_path_factory) -> types.SimpleNamespace:
    base = tmp_path_factory.mktemp("quantized")
    source = make_checkpoint(base / "hf", dtype="bfloat16")
    folder = base / "out"
    assert cli.main([source, str(folder), "--quantization", request.param]) == 0
    return types.SimpleNamespace(source=source, folder=folder, scheme=request.param)


class TestQuantizedFolder:
    """Orbax folders that hold quantized weights."""

    def test_loads_as_it_is(self, saved):
        expected = converters.load(saved.source, dtype="bfloat16", quantization=saved.scheme)
        for wanted in (None, saved.scheme):
            loaded = converters.load(str(saved.folder), dtype="bfloat16", quantization=wanted)
            same(expected, loaded)
        single = converters.load(str(saved.folder))
        assert single.params["embed.embedding"].dtype == np.float32
        kernel, scale = (single.params[f"layers.0.mlp.down.kernel{x}"] for x in ("", "_scale"))
        assert (kernel.dtype, scale.dtype) == (SCHEMES[saved.scheme], np.float32)

    def test_the_folder(self, saved):
        marker = json.loads((saved.folder / "jaxserve.json").read_text())
        assert (marker["quantization"], marker["dtype"]) == (saved.scheme, "bfloat16")
        kernel = saved.folder / "params" / "layers.0.mlp.down.kernel" / "0.0"
        assert kernel.stat().st_size == 128 * 64
        import orbax.checkpoint as ocp

        params = converters.load(str(saved.folder), dtype="bfloat16").params
        with ocp.PyTreeCheckpointer() as checkpointer:
            stock = checkpointer.restore(saved.folder / "params")
        assert stock.keys() == params.keys()
        for path, array in params.items():
            assert np.asarray(stock[path]).tobytes() == np.asarray(array).tobytes()

    def test_another_scheme(self, saved):
        (other,) = set(SCHEMES) - {saved.scheme}
        message = rf"holds weights quantized as '{saved.scheme}', quantization='{other}'"
        with pytest.raises(InvalidRequestError, match=message):
            converters.load(str(saved.folder), quantization=other)

    def test_not_as_safetensors(self, saved, tmp_path, capsys):
        loaded = converters.load(str(saved.folder))
        with pytest.raises(NotSupportedError, match="cannot be saved as safetensors; use orbax"):
            converters.save(loaded, tmp_path / "out", "safetensors")
        arguments = [saved.source, str(tmp_path / "out"), "--format", "safetensors"]
        assert cli.main([*arguments, "--quantization", saved.scheme]) == 1
        assert "cannot be saved as safetensors" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_saved_again(self, saved, tmp_path):
        loaded = converters.load(str(saved.folder), dtype="bfloat16")
        converters.save(loaded, tmp_path / "again")
        same(loaded, converters.load(str(tmp_path / "again"), dtype="bfloat16"))

    def test_a_marker_that_lies(self, saved, tmp_path):
        loaded = converters.load(str(saved.folder), dtype="bfloat16")
        converters.save(loaded, tmp_path / "out")
        marker = tmp_path / "out" / "jaxserve.json"
        good = json.loads(marker.read_text())
        (other,) = set(SCHEMES) - {saved.scheme}
        marker.write_text(json.dumps(good | {"quantization": other}))
        with pytest.raises(ModelLoadError, match=r"mlp\.down\.kernel has dtype \w+, should be"):
            converters.load(str(tmp_path / "out"))
        marker.write_text(json.dumps(good | {"quantization": None}))
        with pytest.raises(ModelLoadError, match=r"unexpected layers\.0\.attn\.o\.kernel_scale"):
            converters.load(str(tmp_path / "out"))
        with pytest.raises(ModelLoadError, match=r"unexpected layers\.0\.attn\.o\.kernel_scale"):
            converters.load(str(tmp_path / "out"), quantization=saved.scheme)

    def test_folders_from_before(self, saved, tmp_path):
        """Markers without the key say: not quantized."""
        converters.save(converters.load(saved.source), tmp_path / "out")
        marker = tmp_path / "out" / "jaxserve.json"
        old = {k: v for k, v in json.loads(marker.read_text()).items() if k != "quantization"}
        marker.write_text(json.dumps(old))
        assert converters.load(str(tmp_path / "out")).declaration.quantization is None
        expected = converters.load(saved.source, quantization=saved.scheme)
        same(expected, converters.load(str(tmp_path / "out"), quantization=saved.scheme))


SHARDED_PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import converters, converters.convert, converters.orbax_format

mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
replicated = NamedSharding(mesh, P())

def placement(path):
    name = path.removesuffix("_scale")
    if name.endswith("gate_up.kernel"):
        return NamedSharding(mesh, P(None, "tensor") if path != name else P(None, None, "tensor"))
    if name.endswith("qkv.kernel"):
        return NamedSharding(mesh, P("tensor") if path != name else P(None, "tensor"))
    if path.endswith((".kernel", ".embedding")):
        return NamedSharding(mesh, P("tensor"))
    return replicated

whole = converters.load(sys.argv[1], quantization="fp8").params
for host in (True, False):
    for module in (converters.convert, converters.orbax_format):
        module.on_cpu = lambda sharding: host
    for path in sys.argv[1:]:
        params = converters.load(path, quantization="fp8", sharding=placement).params
        for name, array in params.items():
            assert array.sharding == placement(name), name
            assert np.asarray(array).tobytes() == np.asarray(whole[name]).tobytes(), name
dummy = converters.load(
    sys.argv[1], load_format="dummy", quantization="fp8", sharding=placement
).params
for name, array in dummy.items():
    assert array.sharding == placement(name), name
print("done")
"""


def test_onto_a_sharding(tmp_path):
    path = make_checkpoint(tmp_path / "hf", tokenizer=False)
    converters.save(converters.load(path), tmp_path / "orbax")
    converters.save(converters.load(path, quantization="fp8"), tmp_path / "quantized")
    paths = [path, str(tmp_path / "orbax"), str(tmp_path / "quantized")]
    assert "done" in on_cpu_devices(8, "-c", SHARDED_PROGRAM, *paths)


OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 128, "max_running_requests": 8,
    "chunked_prefill_size": 128, "max_total_tokens": 2048, "dtype": "float32",
    "cuda_graph_bs": [1, 8], "precompile": False, "page_size": 16,
}  # fmt: skip
GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}


def prompts(count: int = 5, longest: int = 20) -> list[list[int]]:
    """Together, behind multiples of 8 rows, they fit into a step of 128 tokens."""
    rng = np.random.default_rng(5)
    return [rng.integers(4, 500, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


@functools.cache
def run(folder: str, **options) -> tuple[list[list[int]], list[np.ndarray]]:
    """Greedy tokens of each prompt, and the logprobs of prompt and tokens."""
    with jaxserve.Engine(model_path=folder, **OPTIONS, **options) as engine:
        assert engine.get_model_info()["quantization"] == options.get("quantization")
        return generate(engine, prompts())


def generate(engine, batch) -> tuple[list[list[int]], list[np.ndarray]]:
    results = engine.generate(
        input_ids=batch, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0
    )
    logprobs = []
    for result in results:
        meta = result["meta_info"]
        entries = meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]
        logprobs.append(np.array([value for value, *_ in entries]))
    return [result["output_ids"] for result in results], logprobs


def dequantized(loaded: LoadedModel) -> LoadedModel:
    """The same model with kernels of float32, kernel * kernel_scale."""
    plain = registry.declare(loaded.config, "float32")
    params = {path: loaded.params[path] for path in plain.specs}
    for path, scale in loaded.declaration.scales.items():
        params[path] = params[path].astype(jnp.float32) * loaded.params[scale]
    return dataclasses.replace(loaded, declaration=plain, params=params)


BIASED = {"attention_bias": True, "mlp_bias": True}
FAMILY_CASES = [
    ("llama", "fp8", BIASED),
    long("llama", "w8a16_int8", {"tie_word_embeddings": True}),
    long("qwen2", "w8a16_int8", {}),
    ("qwen3", "w8a16_int8", {}),
]


@pytest.mark.parametrize(("family", "scheme", "overrides"), FAMILY_CASES)
def test_the_engine_computes_with_the_dequantized_weights(
    family, scheme, overrides, tiny_models, tmp_path
):
    folder = tiny_models(family, **overrides)
    loaded = converters.load(folder, quantization=scheme)
    converters.save(dequantized(loaded), tmp_path / "dequantized", "safetensors")
    tokens, logprobs = run(folder, quantization=scheme)
    expected_tokens, expected = run(str(tmp_path / "dequantized"))
    assert tokens == expected_tokens
    for ours, theirs in zip(logprobs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_an_engine_on_a_quantized_folder(tiny_models, tmp_path):
    folder = tiny_models("llama", **BIASED)
    assert cli.main([folder, str(tmp_path / "out"), "--quantization", "fp8"]) == 0
    expected = run(folder, quantization="fp8")
    with jaxserve.Engine(model_path=str(tmp_path / "out"), **OPTIONS) as engine:
        assert engine.get_model_info()["quantization"] == "fp8"
        tokens, logprobs = generate(engine, prompts())
    assert tokens == expected[0]
    np.testing.assert_allclose(np.concatenate(logprobs), np.concatenate(expected[1]), atol=1e-6)
    with pytest.raises(InvalidRequestError, match="quantization='w8a16_int8'"):
        jaxserve.Engine(model_path=str(tmp_path / "out"), quantization="w8a16_int8", **OPTIONS)


@pytest.mark.long
def test_dummy_weights_in_the_engine(tiny_models):
    """What benchmarks run: bfloat16, dummy, quantized weights and pages."""
    options = {**OPTIONS, "dtype": "bfloat16", "load_format": "dummy"}
    options |= {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}
    with jaxserve.Engine(model_path=tiny_models("qwen3"), **options) as engine:
        assert all(len(ids) == 16 for ids in generate(engine, prompts())[0])


class Fp8PagesOps(DenseOps):
    """Dense attention over keys and values rounded to float8_e4m3fn, as pages hold them."""

    def attend(self, qkv, cos, sin, cache, meta, spec, *, q_norm=None, k_norm=None):
        q, k, v = split_heads(qkv, cos, sin, spec, q_norm, k_norm)
        k, v = (jnp.clip(x, -448, 448).astype(E4M3).astype(jnp.float32) for x in (k, v))
        groups = q.reshape(len(q), spec.num_kv_heads, -1, spec.head_dim)
        rounded = jnp.concatenate([groups, k[:, :, None], v[:, :, None]], axis=2)
        rounded = rounded.reshape(qkv.shape)
        half = spec.head_dim // 2
        unturned = (jnp.ones((len(qkv), half)), jnp.zeros((len(qkv), half)))
        return super().attend(rounded, *unturned, cache, meta, spec)


class TestFp8Pages:
    @pytest.mark.parametrize("family", long_but(["qwen3", "cohere2", "gemma3"], "qwen3"))
    def test_against_dense_attention_over_rounded_keys_and_values(self, family, tiny_models):
        """A number next to a rounding boundary may fall on either side, hence the mean."""
        folder = tiny_models(family)
        with jaxserve.Engine(model_path=folder, kv_cache_dtype="fp8_e4m3", **OPTIONS) as engine:
            info = engine.get_server_info()
            assert (info["kv_cache_dtype"], info["late_compiles"]) == ("fp8_e4m3", 0)
            tokens, logprobs = generate(engine, prompts())
        loaded = converters.load(folder)
        model = loaded.declaration.bind(loaded.params)

        def dense(ops, ids):
            hidden, _ = model(ids, jnp.arange(len(ids)), None, None, ops)
            return jax.nn.log_softmax(model.logits(hidden))

        near, exact = [], []
        for ops, differences in ((Fp8PagesOps(), near), (DenseOps(), exact)):
            compiled = jax.jit(functools.partial(dense, ops))
            for prompt, output, found in zip(prompts(), tokens, logprobs, strict=True):
                ids = np.array(prompt + output)
                # one length for all, so that it is compiled once: nothing looks ahead
                table = np.asarray(compiled(np.resize(ids, 40).astype(np.int32)))
                expected = table[np.arange(len(ids) - 1), ids[1:]]
                differences.append(np.abs(expected - found))
        near, exact = np.concatenate(near), np.concatenate(exact)
        assert near.mean() < 1e-3 and near.max() < 0.05, (near.mean(), near.max())
        assert 10 * near.mean() < exact.mean() < 0.3, (near.mean(), exact.mean())

    @pytest.mark.parametrize("quantization", [None, long("w8a16_int8")])
    def test_a_batch_gives_each_prompt_what_it_gets_alone(self, tiny_models, quantization):
        options = {**OPTIONS, "kv_cache_dtype": "fp8_e4m3", "quantization": quantization}
        with jaxserve.Engine(model_path=tiny_models("qwen3"), **options) as engine:
            together, logprobs = generate(engine, prompts())
            for prompt, tokens, values in zip(prompts(), together, logprobs, strict=True):
                (alone,), (alone_values,) = generate(engine, [prompt])
                assert alone == tokens
                np.testing.assert_allclose(alone_values, values, rtol=0, atol=2e-3)

    @pytest.mark.long
    def test_samples_share_their_prompts_pages(self, tiny_models):
        """The last page of a prompt is copied for each sample."""
        options = {**OPTIONS, "kv_cache_dtype": "fp8_e4m3"}
        params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
        with jaxserve.Engine(model_path=tiny_models("qwen3"), **options) as engine:
            prompt = list(range(10, 33))
            one = engine.generate(input_ids=prompt, sampling_params=params)["output_ids"]
            many = engine.generate(input_ids=prompt, sampling_params={**params, "n": 3})
            assert [sample["output_ids"] for sample in many] == [one] * 3

    def test_the_pool_holds_twice_the_tokens_of_16_bits(self):
        model = registry.config_from_hf(make_config())
        half, byte = (
            pool.page_bytes(model, 16, jnp.dtype(dtype)) for dtype in (jnp.bfloat16, E4M3)
        )
        assert half == 2 * byte
        stats = {"bytes_limit": 1 << 20, "bytes_in_use": 0}
        device = types.SimpleNamespace(memory_stats=lambda: stats)
        config = types.SimpleNamespace(
            program=types.SimpleNamespace(page_size=16, max_rows=1 << 20, table_width=64),
            max_total_tokens=None, mem_fraction=0.9, memory=GPU.memory,
        )  # fmt: skip
        few, many = (
            pool.count_pages(config, model, jnp.dtype(dtype), device, 0, 0)  # type: ignore[arg-type]
            for dtype in (jnp.bfloat16, E4M3)
        )
        assert many in (2 * few, 2 * few + 1)

    def test_what_the_option_means(self):
        single, half = jnp.dtype("float32"), jnp.dtype("bfloat16")
        for dtype in (single, half):
            assert pool.cache_dtype("auto", dtype) == dtype
            assert pool.cache_dtype("fp8_e4m3", dtype) == E4M3
        for name in ("bf16", "bfloat16"):
            assert pool.cache_dtype(name, half) == half
            with pytest.raises(InvalidRequestError, match=f"kv_cache_dtype='{name}'.*float32"):
                pool.cache_dtype(name, single)

    def test_bfloat16_pages_of_a_float32_engine(self, tiny_models):
        with pytest.raises(InvalidRequestError, match="kv_cache_dtype='bf16' goes with dtype"):
            jaxserve.Engine(model_path=tiny_models("llama"), kv_cache_dtype="bf16", **OPTIONS)
