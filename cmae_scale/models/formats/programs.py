"""The encoder as a program that runs without this project: ONNX and torch.export."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import PART
from cmae_scale.models.build import build_encoder
from cmae_scale.models.encoder import ImageEncoder
from cmae_scale.models.formats.model_file import ModelFile

OPSET = 18  # of ONNX; torch's exporter writes this one without converting


class Tokens(nn.Module):
    """From a batch of images to all tokens of the encoder, class token first where there is one."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, images: Float[Tensor, "batch channels side side"]
    ) -> Float[Tensor, "batch tokens embed"]:
        """Tokens of whole images."""
        tokens: Tensor = self.encoder(images, None)
        return tokens


def build_tokens(file: ModelFile) -> Tokens:
    """The file's encoder as a module of images alone, in evaluation mode."""
    state = file.part("online_encoder")
    encoder = build_encoder(file.cfg.model, img_px=file.cfg.views.img_px, final_norm="norm.weight" in state)
    encoder.load_state_dict(state)
    return Tokens(encoder).eval()


def write_torch_export(file: ModelFile, path: Path) -> None:
    """A .pt2 file for torch.export.load: images [batch, 3, side, side] to tokens, any batch size."""
    part = path.with_name(PART + path.name)  # torch wants the ending
    torch.export.save(_trace(file), part)
    part.replace(path)


def write_onnx(file: ModelFile, path: Path) -> None:
    """An ONNX file with its weights inside: input "images", output "tokens", any batch size."""
    try:
        import onnxscript  # noqa: F401 -- what torch's exporter needs
    except ImportError:
        raise ConfigError('ONNX needs more packages: pip install "cmae-scale[export]"') from None
    part = path.with_name(path.name + PART)
    torch.onnx.export(
        _trace(file),
        f=part,
        input_names=["images"],
        output_names=["tokens"],
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    part.replace(path)


def _trace(file: ModelFile) -> torch.export.ExportedProgram:
    side = file.cfg.views.img_px
    batch = torch.export.Dim("batch", min=1)
    images = torch.zeros(2, 3, side, side)
    with torch.no_grad():
        return torch.export.export(build_tokens(file), (images,), dynamic_shapes=({0: batch},))
