"""Other projects' names of the same tensors, as tables that work in both directions."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from cmae_scale.core.errors import ConfigError

Layout = Literal["ours", "mae", "cmae", "huggingface"]
WHOSE: dict[Layout, str] = {
    "ours": "this project's names",
    "mae": "names of MAE, ConvMAE and timm",
    "cmae": "names of the official CMAE",
    "huggingface": "names of Hugging Face",
}
Pair: TypeAlias = tuple[str, str]  # their name, ours; {i} is a number, {p} a last name, {rest} anything

_PLACES = {"{i}": r"(?P<i>\d+)", "{p}": r"(?P<p>[a-z_]+)", "{rest}": r"(?P<rest>.+)"}

_DECODER: list[Pair] = [
    ("decoder_embed.{p}", "completion.narrow.{p}"),
    ("mask_token", "completion.mask_token"),
    ("decoder_pos_embed", "completion.pos_embed"),
]

# MAE and ConvMAE, pre-trained and fine-tuned, and timm, whose names MAE has.
# Source: facebookresearch/mae models_mae.py, models_vit.py; Alpha-VL/ConvMAE models_convmae.py
MAE: list[Pair] = [
    *((name, f"online_encoder.{name}") for name in ("cls_token", "pos_embed", "norm.{p}")),
    *((name, f"online_encoder.{name}") for name in ("patch_embed.{rest}", "blocks.{rest}")),
    *((f"patch_embed{n}.{{rest}}", f"online_encoder.patch_embed{n}.{{rest}}") for n in (1, 2, 3, 4)),
    *((f"blocks{n}.{{rest}}", f"online_encoder.blocks{n}.{{rest}}") for n in (1, 2, 3)),
    *((f"stage{n}_output_decode.{{p}}", f"online_encoder.stage{n}_output_decode.{{p}}") for n in (1, 2)),
    *((theirs, f"pixel_decoder.{ours}") for theirs, ours in _DECODER),
    ("decoder_blocks.{rest}", "pixel_decoder.completion.blocks.{rest}"),
    ("decoder_norm.{p}", "pixel_decoder.norm.{p}"),
    ("decoder_pred.{p}", "pixel_decoder.predict.{p}"),
    ("fc_norm.{p}", "classifier.fc_norm.{p}"),
    ("head.{p}", "classifier.head.{p}"),  # one of several layers is another method's projector: left out
]


def _mm_block(theirs: str, ours: str) -> list[Pair]:
    parts = {
        "ln1": "norm1",
        "ln2": "norm2",
        "attn.qkv": "attn.qkv",
        "attn.proj": "attn.proj",
        "ffn.layers.0.0": "mlp.fc1",
        "ffn.layers.1": "mlp.fc2",
    }
    return [(f"{theirs}.{{i}}.{a}.{{p}}", f"{ours}.{{i}}.{b}.{{p}}") for a, b in parts.items()]


def _mm_encoder(theirs: str, ours: str) -> list[Pair]:
    return [
        *((f"{theirs}{name}", f"{ours}.{name}") for name in ("cls_token", "pos_embed")),
        (f"{theirs}patch_embed.projection.{{p}}", f"{ours}.patch_embed.proj.{{p}}"),
        *_mm_block(f"{theirs}layers", f"{ours}.blocks"),
        (f"{theirs}ln1.{{p}}", f"{ours}.norm.{{p}}"),
        (f"{theirs}fc_norm.{{p}}", "classifier.fc_norm.{p}"),
    ]


def _mm_decoder(name: str, *, norm: str, predict: str) -> list[Pair]:
    return [
        *((f"{name}.{theirs}", f"{name}.{ours}") for theirs, ours in _DECODER),
        *_mm_block(f"{name}.decoder_blocks", f"{name}.completion.blocks"),
        (f"{name}.ln1.{{p}}", f"{name}.{norm}.{{p}}"),
        (f"{name}.decoder_pred.{{p}}", f"{name}.{predict}.{{p}}"),
    ]


def _mm_head(theirs: str, ours: str) -> list[Pair]:
    parts = (("fc0", "fc1"), ("bn0", "norm"), ("fc1", "fc2"))
    return [(f"{theirs}.{a}.{{p}}", f"{ours}.{b}.{{p}}") for a, b in parts]


# Official CMAE, whole, fine-tuned, and what its tools/extract_backbone_weights.py leaves (no prefix).
# Source: ZhichengHuang/CMAE models/; names of norms and feed-forward layers from mmcv
CMAE: list[Pair] = [
    *_mm_encoder("backbone.", "online_encoder"),
    *_mm_encoder("target_backbone.", "target_encoder"),
    *_mm_decoder("pixel_decoder", norm="norm", predict="predict"),
    *_mm_decoder("feature_decoder", norm="head.norm", predict="head.predict"),
    *_mm_head("projector", "projector"),
    *_mm_head("target_projector", "target_projector"),
    *_mm_head("head.predictor", "predictor"),
    ("head.head.{p}", "classifier.head.{p}"),
]

_HF_BLOCK: list[Pair] = [
    ("layernorm_before.{p}", "norm1.{p}"),
    ("layernorm_after.{p}", "norm2.{p}"),
    ("attention.attention.query.{p}", "attn.q.{p}"),
    ("attention.attention.key.{p}", "attn.k.{p}"),
    ("attention.attention.value.{p}", "attn.v.{p}"),
    ("attention.output.dense.{p}", "attn.proj.{p}"),
    ("intermediate.dense.{p}", "mlp.fc1.{p}"),
    ("output.dense.{p}", "mlp.fc2.{p}"),
]

# Hugging Face's ViT and ViTMAE as they are in files; query, key and value are apart.
# Source: huggingface/transformers modeling_vit.py, modeling_vit_mae.py, save_pretrained of 5.24
HUGGINGFACE: list[Pair] = [
    ("vit.embeddings.cls_token", "online_encoder.cls_token"),
    ("vit.embeddings.position_embeddings", "online_encoder.pos_embed"),
    ("vit.embeddings.patch_embeddings.projection.{p}", "online_encoder.patch_embed.proj.{p}"),
    *((f"vit.encoder.layer.{{i}}.{a}", f"online_encoder.blocks.{{i}}.{b}") for a, b in _HF_BLOCK),
    ("vit.layernorm.{p}", "online_encoder.norm.{p}"),
    *((f"decoder.{theirs}", f"pixel_decoder.{ours}") for theirs, ours in _DECODER),
    *(
        (f"decoder.decoder_layers.{{i}}.{a}", f"pixel_decoder.completion.blocks.{{i}}.{b}")
        for a, b in _HF_BLOCK
    ),
    ("decoder.decoder_norm.{p}", "pixel_decoder.norm.{p}"),
    ("decoder.decoder_pred.{p}", "pixel_decoder.predict.{p}"),
]

_HF_ENDS = ("classifier.", "pooler.")  # both on the class token after the norm: of another task

# transformers 5 has shorter names in memory; files may have either
_HF_SHORT: list[Pair] = [
    ("{rest}layers.{i}.attention.q_proj.{p}", "{rest}layer.{i}.attention.attention.query.{p}"),
    ("{rest}layers.{i}.attention.k_proj.{p}", "{rest}layer.{i}.attention.attention.key.{p}"),
    ("{rest}layers.{i}.attention.v_proj.{p}", "{rest}layer.{i}.attention.attention.value.{p}"),
    ("{rest}layers.{i}.attention.o_proj.{p}", "{rest}layer.{i}.attention.output.dense.{p}"),
    ("{rest}layers.{i}.mlp.fc1.{p}", "{rest}layer.{i}.intermediate.dense.{p}"),
    ("{rest}layers.{i}.mlp.fc2.{p}", "{rest}layer.{i}.output.dense.{p}"),
    ("{rest}layers.{i}.layernorm_before.{p}", "{rest}layer.{i}.layernorm_before.{p}"),
    ("{rest}layers.{i}.layernorm_after.{p}", "{rest}layer.{i}.layernorm_after.{p}"),
]

# how the blocks' place may be written, after the above, and how it is in files; save_pretrained of
# transformers 5.24 writes the decoder's in the third way
_HF_BLOCKS = {
    "vit.layer.": "vit.encoder.layer.",
    "decoder.decoder_layer.": "decoder.decoder_layers.",
    "decoder.decoder_encoder.layer.": "decoder.decoder_layers.",
}


class Renamed(NamedTuple):
    """Tensors under our names, the names that a table does not know, and known ones of no use here."""

    tensors: dict[str, Tensor]
    unknown: list[str]
    left_out: tuple[str, ...] = ()


def rename(tensors: Mapping[str, Tensor], table: Sequence[Pair], *, reverse: bool = False) -> Renamed:
    """`tensors` under the second names of `table`, or with `reverse` from the second to the first."""
    renamed, unknown = {}, []
    rules = _compile(table, reverse=reverse)
    for name, tensor in tensors.items():
        for pattern, template in rules:
            if match := pattern.fullmatch(name):
                renamed[template.format(**match.groupdict())] = tensor
                break
        else:
            unknown.append(name)
    return Renamed(renamed, unknown)


def _compile(table: Sequence[Pair], *, reverse: bool) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for theirs, ours in table:
        source, template = (ours, theirs) if reverse else (theirs, ours)
        pattern = re.escape(source)
        for place, group in _PLACES.items():
            pattern = pattern.replace(re.escape(place), group)
        rules.append((re.compile(pattern), template))
    return rules


def find_layout(names: Sequence[str]) -> Layout:
    """Whose names these are. Raises ConfigError where none of the known ones fit."""
    known = set(names)
    if any(name.startswith("online_encoder.") for name in known):
        return "ours"
    if any(name.endswith("patch_embed.projection.weight") for name in known):
        return "cmae"
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in known):
        return "huggingface"
    if known & {"patch_embed.proj.weight", "patch_embed1.proj.weight"}:
        return "mae"
    raise ConfigError(
        f"no known encoder among {len(known)} tensors ({', '.join(sorted(known)[:4])}, ...): known are MAE, "
        "ConvMAE, official CMAE, timm's and Hugging Face's ViT, and this project's own"
    )


def to_ours(tensors: Mapping[str, Tensor], layout: Layout) -> Renamed:
    """Tensors of a known layout under our names; of Hugging Face's, query, key and value are put together."""
    match layout:
        case "ours":
            return Renamed(dict(tensors), [])
        case "mae":
            renamed = rename(tensors, MAE)
            heads = tuple(name for name in renamed.unknown if name.startswith("head."))
            return Renamed(renamed.tensors, [n for n in renamed.unknown if n not in heads], heads)
        case "cmae":
            extracted = "patch_embed.projection.weight" in tensors
            return rename(
                {f"backbone.{name}": tensor for name, tensor in tensors.items()} if extracted else tensors,
                CMAE,
            )
        case "huggingface":
            renamed = rename(_spell_out_huggingface(tensors), HUGGINGFACE)
            ends = tuple(name for name in tensors if name.startswith(_HF_ENDS))
            return Renamed(_join_attention(renamed.tensors), renamed.unknown, ends)


def to_huggingface(tensors: Mapping[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """An encoder's and a pixel decoder's tensors under Hugging Face's names; `prefix` is "vit." or none."""
    renamed = rename(_split_attention(tensors), HUGGINGFACE, reverse=True)
    assert not renamed.unknown, renamed.unknown
    return {
        prefix + name.removeprefix("vit.") if name.startswith("vit.") else name: tensor
        for name, tensor in renamed.tensors.items()
    }


def _spell_out_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Long names with the prefix that a whole ViTMAE has, whichever way they were written."""
    whole = {
        name if name.startswith(("vit.", "decoder.")) else f"vit.{name}": tensor
        for name, tensor in tensors.items()
        if not name.startswith(_HF_ENDS)
    }
    short = rename(whole, _HF_SHORT)
    spelt = {name: whole[name] for name in short.unknown} | short.tensors
    for written, name in _HF_BLOCKS.items():
        spelt = {other.replace(written, name): tensor for other, tensor in spelt.items()}
    return spelt


def _join_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for name, tensor in tensors.items():
        if ".attn.q." in name:
            rest = [tensors.get(name.replace(".attn.q.", f".attn.{part}.")) for part in "kv"]
            if not any(part is None for part in rest):
                joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([tensor, *rest])  # type: ignore[list-item]
        elif ".attn.k." not in name and ".attn.v." not in name:
            joined[name] = tensor
    return joined


def _split_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    split = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".attn.qkv.", f".attn.{part}.")] = values
        else:
            split[name] = tensor
    return split
