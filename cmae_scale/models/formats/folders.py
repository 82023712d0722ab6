"""Folders that timm, Hugging Face and this project load, from a file of any known origin."""

import json
from pathlib import Path
from typing import Any

from cmae_scale.config.cmae import ModelConfig, NetworkConfig, ViewsConfig
from cmae_scale.config.sizes import NAMED_SIZES, NAMED_STAGES, read_size, read_stages
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import write_text
from cmae_scale.layers.blocks import NORM_EPS
from cmae_scale.models.formats.model_file import PRETRAINING_ONLY, ModelFile
from cmae_scale.models.formats.names import to_huggingface
from cmae_scale.models.weights import PROCESSOR_FILE, describe_encoder, export_encoder, write_model


def write_encoder(file: ModelFile, folder: Path) -> None:
    """The online encoder as a run exports it: for `read_encoder`, and for timm unless it is a hybrid.

    Of a fine-tuned transformer this is the encoder without a norm at its end.
    """
    state = file.part("online_encoder")
    if file.cfg.model.is_hybrid and "stage1_output_decode.weight" not in state:
        raise ConfigError(
            f"{file.path} is a fine-tuned hybrid, which no longer has the sum of stages that an encoder ends "
            "with: convert the pre-trained file"
        )
    export_encoder(state, folder, model=_named(file.cfg.model), views=_views(file))


def write_timm(file: ModelFile, folder: Path) -> None:
    """A folder for timm.create_model("local-dir:FOLDER", pretrained=True), classifier included."""
    _refuse_hybrid(file, "timm")
    if file.part("classifier"):
        write_classifier(file, folder)
    else:
        write_encoder(file, folder)


def write_classifier(file: ModelFile, folder: Path) -> None:
    """A fine-tuned model with its classifier: for timm, or for `read_classifier` if it is a hybrid.

    With `fc_norm` it pools the patches, without it looks at the class token, as MAE and timm have it.
    """
    classifier = file.part("classifier")
    if "head.weight" not in classifier:
        raise ConfigError(f"{file.path} has no classifier: write --to encoder")
    pools = "fc_norm.weight" in classifier
    if file.cfg.model.is_hybrid and not pools:
        raise ConfigError(
            f"{file.path} is a hybrid without fc_norm, so without the mean before its classifier"
        )
    config = describe_encoder(_named(file.cfg.model), views=_views(file))
    config["num_classes"] = config["pretrained_cfg"]["num_classes"] = len(classifier["head.weight"])
    config["model_args"]["fc_norm"] = pools
    if not file.cfg.model.is_hybrid:
        config["global_pool"] = config["model_args"]["global_pool"] = "avg" if pools else "token"
    if file.class_names:
        config["label_names"] = config["pretrained_cfg"]["label_names"] = list(file.class_names)
    unused = PRETRAINING_ONLY if pools else ()
    encoder = {n: t for n, t in file.tensors.items() if n.startswith("online_encoder.")}
    kept = {n: t for n, t in encoder.items() if not n.startswith(unused)}
    state = {n.removeprefix("online_encoder."): tensor for n, tensor in kept.items()}
    write_model({**state, **classifier}, folder, config=config)


def write_huggingface(file: ModelFile, folder: Path) -> None:
    """A folder for transformers.ViTModel.from_pretrained(FOLDER, add_pooling_layer=False)."""
    _refuse_hybrid(file, "Hugging Face")
    why = "ViTModel ends with a norm, which a fine-tuned model and a target branch lack"
    _need(file, "online_encoder.norm.weight", why)
    encoder = {n: t for n, t in file.tensors.items() if n.startswith("online_encoder.")}
    config = {"architectures": ["ViTModel"], "model_type": "vit", **_describe_vit(file)}
    write_model(to_huggingface(encoder, prefix=""), folder, config=config)
    _write_processor(file, folder)


def write_huggingface_mae(file: ModelFile, folder: Path) -> None:
    """A folder for transformers.ViTMAEForPreTraining.from_pretrained(FOLDER): encoder and pixel decoder."""
    _refuse_hybrid(file, "Hugging Face")
    _need(file, "pixel_decoder.predict.weight", "ViTMAEForPreTraining needs a pixel decoder")
    decoder = file.cfg.model.pixel_decoder
    config = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **_describe_vit(file),
        "decoder_hidden_size": decoder.embed_dim,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.num_heads,
        "decoder_intermediate_size": int(decoder.embed_dim * decoder.mlp_ratio),
        "mask_ratio": 0.75,
        "norm_pix_loss": True,
    }
    both = {n: t for n, t in file.tensors.items() if n.split(".")[0] in ("online_encoder", "pixel_decoder")}
    write_model(to_huggingface(both, prefix="vit."), folder, config=config)
    _write_processor(file, folder)


def write_whole(file: ModelFile, folder: Path) -> None:
    """All parts under our names: what `cmae.model.init` starts a run from."""
    network = file.cfg.model_dump(mode="json", include=set(NetworkConfig.model_fields))
    config: dict[str, Any] = {"architecture": "cmae", "cmae": network}
    if file.is_bgr:
        config["channels"] = "bgr"
    write_model(file.tensors, folder, config=config)


def _refuse_hybrid(file: ModelFile, whose: str) -> None:
    if file.cfg.model.is_hybrid:
        raise ConfigError(f"{file.path} is a hybrid encoder, which {whose} does not have: write --to encoder")


def _need(file: ModelFile, name: str, why: str) -> None:
    if name not in file.tensors:
        raise ConfigError(f"{file.path} has no {name}: {why}")


def _views(file: ModelFile) -> ViewsConfig:
    return file.cfg.views.model_copy(update={"mean": file.mean, "std": file.std})


def _named(model: ModelConfig) -> ModelConfig:
    """The same sizes by their name, where there is one, so that the folder says it."""
    for name, size in NAMED_SIZES.items():
        if size == read_size(model) and NAMED_STAGES.get(name) == read_stages(model):
            return model.model_copy(
                update={"encoder": name, "embed_dim": None, "depth": None, "num_heads": None, "conv": None}
            )
    return model


def _describe_vit(file: ModelFile) -> dict[str, Any]:
    """Sizes in Hugging Face's words. Source: transformers configuration_vit.py."""
    model, size = file.cfg.model, read_size(file.cfg.model)
    return {
        "hidden_size": size.embed_dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": int(size.embed_dim * model.mlp_ratio),
        "image_size": file.cfg.views.img_px,
        "patch_size": model.patch_size,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "qkv_bias": True,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }


def _write_processor(file: ModelFile, folder: Path) -> None:
    """How images are prepared, for transformers.AutoImageProcessor."""
    side = {"height": file.cfg.views.img_px, "width": file.cfg.views.img_px}
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": 3,  # Pillow's bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(file.mean),
        "image_std": list(file.std),
    }
    write_text(folder / PROCESSOR_FILE, json.dumps(processor, indent=2) + "\n")
