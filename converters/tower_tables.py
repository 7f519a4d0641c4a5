"""One table per tower: which Hugging Face tensors make up each parameter. As `tables`, with the
names of `vision_names`."""

from __future__ import annotations

from collections.abc import Callable

from converters.tables import Rule, Table
from jaxserve.models.vision.clip import LlavaConfig
from jaxserve.models.vision.layers import padded
from jaxserve.models.vision.qwen2_vl import Qwen2VLConfig
from jaxserve.models.vision.siglip import TilesConfig
from jaxserve.models.vision.tower import TowerConfig

_OURS, _QWENS = "layers.{i}.", "visual.blocks.{i}."


def _linear(
    path: str,
    *names: str,
    widths: tuple[int, ...] | None = None,
    rows: int | None = None,
    padding: int = 0,
) -> tuple[Rule, ...]:
    """Rules of a product made of `names` side by side, which have so many columns each. rows,
    padding: see `Rule`."""
    columns = None if widths is None else lambda config: widths
    weights, biases = (tuple(f"{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    return (
        Rule(f"{path}.kernel", weights, True, columns, rows=rows, padding=padding),
        Rule(f"{path}.bias", biases, False, columns, padding=padding),
    )


def _mlp(
    size: int, first: tuple[str, ...], second: str, ours: tuple[str, str] = ("fc1", "fc2")
) -> tuple[Rule, ...]:
    """Rules of a layer's MLP of dim `size`: its first product, or those of gate and up, and its
    second one, which are padded."""
    one, two = (f"{_OURS}mlp.{name}" for name in ours)
    widths, padding = (size,) * len(first), padded(size) - size
    return (
        *_linear(one, *first, widths=widths, padding=padding),
        *_linear(two, second, rows=size),
    )


def _norm(path: str, name: str) -> tuple[Rule, ...]:
    return Rule(f"{path}.scale", (f"{name}.weight",)), Rule(f"{path}.bias", (f"{name}.bias",))


def _patches(name: str, axes: tuple[int, ...]) -> tuple[Rule, ...]:
    """axes: of the convolution's kernel behind its outputs."""
    return (
        Rule("patch_embed.kernel", (f"{name}.weight",), True, axes=axes),
        Rule("patch_embed.bias", (f"{name}.bias",)),
    )


def _qwen_vl(config: TowerConfig, *more: Rule) -> Table:
    """more: rules of the layers' MLP and of what is behind them."""
    assert isinstance(config, Qwen2VLConfig)
    side = config.patch_size
    return Table(
        (
            *_patches("visual.patch_embed.proj", (config.channels, config.frames, side, side)),
            *_norm(_OURS + "norm1", _QWENS + "norm1"),
            *_norm(_OURS + "norm2", _QWENS + "norm2"),
            *_linear(_OURS + "attn.qkv", _QWENS + "attn.qkv"),
            *_linear(_OURS + "attn.o", _QWENS + "attn.proj"),
            *more,
        )
    )


_QWEN2_MERGER = (
    *_norm("merger.norm", "visual.merger.ln_q"),
    *_linear("merger.mlp.fc1", "visual.merger.mlp.0"),
    *_linear("merger.mlp.fc2", "visual.merger.mlp.2"),
)


def _qwen2_vl(config: TowerConfig) -> Table:
    assert isinstance(config, Qwen2VLConfig)
    mlp = _mlp(config.mlp_dim, (_QWENS + "mlp.fc1",), _QWENS + "mlp.fc2")
    return _qwen_vl(config, *mlp, *_QWEN2_MERGER)


def _qwen25_vl(config: TowerConfig) -> Table:
    assert isinstance(config, Qwen2VLConfig)
    names = (_QWENS + "mlp.gate_proj", _QWENS + "mlp.up_proj")
    mlp = _mlp(config.mlp_dim, names, _QWENS + "mlp.down_proj", ("gate_up", "down"))
    return _qwen_vl(config, *mlp, *_QWEN2_MERGER)


def _qwen3_vl(config: TowerConfig) -> Table:
    assert isinstance(config, Qwen2VLConfig)

    def merger(ours: str, theirs: str) -> tuple[Rule, ...]:
        return (
            *_norm(f"{ours}.norm", f"{theirs}.norm"),
            *_linear(f"{ours}.mlp.fc1", f"{theirs}.linear_fc1"),
            *_linear(f"{ours}.mlp.fc2", f"{theirs}.linear_fc2"),
        )

    return _qwen_vl(
        config,
        Rule("positions", ("visual.pos_embed.weight",)),
        *_mlp(config.mlp_dim, (_QWENS + "mlp.linear_fc1",), _QWENS + "mlp.linear_fc2"),
        *merger("merger", "visual.merger"),
        *merger("mergers.{i}", "visual.deepstack_merger_list.{i}"),
    )


def _tiles(config: TilesConfig, prefix: str, *more: Rule) -> tuple[Rule, ...]:
    """Rules of what SigLIP's and CLIP's towers have in the same places."""
    theirs, side = prefix + "encoder.layers.{i}.", config.patch_size
    qkv = tuple(f"{theirs}self_attn.{name}_proj" for name in "qkv")
    return (
        *_patches(prefix + "embeddings.patch_embedding", (config.channels, side, side)),
        Rule("positions", (prefix + "embeddings.position_embedding.weight",)),
        *_norm(_OURS + "norm1", theirs + "layer_norm1"),
        *_norm(_OURS + "norm2", theirs + "layer_norm2"),
        *_linear(_OURS + "attn.qkv", *qkv, widths=(config.dim,) * 3),
        *_linear(_OURS + "attn.o", theirs + "self_attn.out_proj"),
        *_mlp(config.mlp_dim, (theirs + "mlp.fc1",), theirs + "mlp.fc2"),
        *more,
    )


def _gemma3(config: TowerConfig) -> Table:
    assert isinstance(config, TilesConfig)
    projector = "multi_modal_projector.mm_"
    rules = _tiles(
        config,
        "vision_tower.",
        *_norm("final_norm", "vision_tower.post_layernorm"),
        Rule("norm.scale", (projector + "soft_emb_norm.weight",)),
        Rule("projection.kernel", (projector + "input_projection_weight",)),
    )
    linears = ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
    parts = ("attention.in_proj_weight", "attention.in_proj_bias", "probe")
    parts += tuple(f"{name}.{kind}" for name in linears for kind in ("weight", "bias"))
    return Table(rules, tuple(f"vision_tower.head.{part}" for part in parts))


def _idefics3(config: TowerConfig) -> Table:
    assert isinstance(config, TilesConfig)
    return Table(
        _tiles(
            config,
            "vision_model.",
            *_norm("final_norm", "vision_model.post_layernorm"),
            *_linear("projection", "connector.modality_projection.proj"),
        )
    )


def _llava(config: TowerConfig) -> Table:
    assert isinstance(config, LlavaConfig)
    prefix, projector = "vision_tower.", "multi_modal_projector."
    rules = _tiles(
        config,
        prefix,
        Rule("class_token", (prefix + "embeddings.class_embedding",)),
        *_norm("first_norm", prefix + "pre_layrnorm"),
        *_linear("projector.fc1", projector + "linear_1"),
        *_linear("projector.fc2", projector + "linear_2"),
    )
    behind = (rule for rule in rules if rule.path.startswith(_OURS))
    sources = [source for rule in behind for source in rule.sources]
    unused = [name.replace("{i}", str(layer)) for layer in config.unused for name in sources]
    ends = (prefix + "post_layernorm.weight", prefix + "post_layernorm.bias")
    return Table(rules, (*unused, *ends, prefix + "embeddings.position_ids"))


_TABLES: dict[str, Callable[[TowerConfig], Table]] = {
    "Gemma3ForConditionalGeneration": _gemma3,
    "Idefics3ForConditionalGeneration": _idefics3,
    "LlavaForConditionalGeneration": _llava,
    "Qwen2VLForConditionalGeneration": _qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": _qwen25_vl,
    "Qwen3VLForConditionalGeneration": _qwen3_vl,
    "SmolVLMForConditionalGeneration": _idefics3,
}


def tower_table(config: TowerConfig) -> Table:
    """A tower's table."""
    return _TABLES[config.architecture](config)
