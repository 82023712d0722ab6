"""Bring weights from and to other projects: MAE, ConvMAE, official CMAE, timm, Hugging Face, ONNX."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.core.cli import Parser, run_command
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.terminal import tell

if TYPE_CHECKING:
    from cmae_scale.models.export import Library
    from cmae_scale.models.formats.model_file import ModelFile

FORMATS = {
    "encoder": "folder for cmae_scale.models.read_encoder, and for timm unless it is a hybrid",
    "timm": 'folder for timm.create_model("local-dir:OUT", pretrained=True), with a classifier if IN has one',
    "classifier": "folder of a fine-tuned model: for timm, or cmae_scale.models.read_classifier if a hybrid",
    "huggingface": "folder for transformers.ViTModel",
    "huggingface_mae": "folder for transformers.ViTMAEForPreTraining: encoder and pixel decoder",
    "onnx": "file: images to the encoder's tokens",
    "torch_export": "file for torch.export.load: the same",
    "cmae": "folder of all parts that the file has, for cmae.model.init",
}
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}  # of the formats that are one file
LIBRARIES: "dict[str, Library]" = {  # of the formats that get a card; a hybrid needs ours
    "encoder": "timm",
    "timm": "timm",
    "classifier": "timm",
    "huggingface": "transformers",
    "huggingface_mae": "transformers",
}
EXAMPLES = """\
  python -m cmae_scale.convert mae_pretrain_vit_base_full.pth weights/mae --to cmae
  python -m cmae_scale.convert runs/vitb weights/vit --to huggingface
  python -m cmae_scale.convert cmae_vit-base-p16_32xb128-coslr-300e_in1k.pth weights/cmae --to encoder
  python -m cmae_scale.convert runs/convvitb encoder.onnx --to onnx
  python -m cmae_scale.convert runs/vitb/encoder hub/vitb --to encoder --push_to_hub me/vitb

IN is a run's folder (its newest whole checkpoint), one checkpoint, a .pth or .safetensors file, or a folder
with model.safetensors and config.json: MAE and ConvMAE (pre-trained or fine-tuned), official CMAE (whole,
fine-tuned, or its backbone), timm's and Hugging Face's ViT, Hugging Face's ViTMAE, or this project's own. No
code in it is run. Sizes are read from the tensors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    return run_command(convert, argv)


def convert(argv: Sequence[str] | None) -> None:
    """Read IN, check that it is whole, and write OUT."""
    args = read_arguments(argv)
    from cmae_scale.models.formats.destination import check_destination
    from cmae_scale.models.formats.hub import push_folder
    from cmae_scale.models.formats.model_file import read_model_file
    from cmae_scale.models.formats.shapes import HeadCounts

    if not args.source.exists():
        raise ConfigError(f"{args.source} does not exist: give a file of weights or a folder of them")
    decoder_heads = args.decoder_heads
    heads = HeadCounts(args.num_heads, pixel_decoder=decoder_heads, feature_decoder=decoder_heads)
    file = read_model_file(args.source, heads=heads)
    suffix = SUFFIXES.get(args.to)
    check_destination(args.out, source=file.path, suffix=suffix, overwrite=args.overwrite)
    if args.channels == "rgb":
        file = file.to_rgb()
    elif file.is_bgr:
        tell("warning: these weights want BGR images normalised with RGB's mean and std", to=sys.stderr)
    if args.part == "target":
        file = file.to_target()
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        find_writer(args.to)(file, args.out)
    except PermissionError as error:
        raise ConfigError(f"{args.out} cannot be written ({error}): write to another place") from None
    tell(file.describe())
    if args.to in LIBRARIES:
        write_its_card(file, args)
    if args.push_to_hub:
        push_folder(args.out, repository=args.push_to_hub)
    tell(f"{args.out}: {FORMATS[args.to]}")


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What to convert, to what, and the numbers that no shape tells."""
    formats = "\n".join(f"  {name:16} {what}" for name, what in FORMATS.items())
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog=f"formats of --to:\n{formats}\n\nexamples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="IN", help="file or folder of weights, or a run")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder or file to write")
    parser.add_argument("--to", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "--num_heads",
        type=int,
        metavar="N",
        help="attention heads of the encoder, if not the published number",
    )
    parser.add_argument("--decoder_heads", type=int, metavar="N", help="the same of the decoders")
    parser.add_argument(
        "--channels",
        choices=("rgb", "keep"),
        default="rgb",
        help="rgb (default): weights trained on BGR images, as the official CMAE's, are made to take RGB",
    )
    parser.add_argument(
        "--part",
        choices=("online", "target"),
        default="online",
        help="the trained encoder (default), or its moving average",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier conversion; nothing else is replaced"
    )
    parser.add_argument(
        "--license", default="unknown", metavar="NAME", help="the licence field of the card (README.md)"
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="USER/NAME",
        help="also upload OUT there, to a new repository as a private one",
    )
    args = parser.parse_args(argv)
    if args.part == "target" and args.to in ("cmae", "huggingface_mae"):
        parser.error(f"--part target is an encoder alone, and --to {args.to} more than that")
    if args.push_to_hub and args.to not in LIBRARIES:
        parser.error(f"--push_to_hub takes a folder that others load: --to {', '.join(LIBRARIES)}")
    return args


def find_writer(to: str) -> "Callable[[ModelFile, Path], None]":
    """The function that writes a format."""
    from cmae_scale.models.formats import folders, programs

    return {
        "encoder": folders.write_encoder,
        "timm": folders.write_timm,
        "classifier": folders.write_classifier,
        "huggingface": folders.write_huggingface,
        "huggingface_mae": folders.write_huggingface_mae,
        "onnx": programs.write_onnx,
        "torch_export": programs.write_torch_export,
        "cmae": folders.write_whole,
    }[to]


def write_its_card(file: "ModelFile", args: argparse.Namespace) -> None:
    """What is known of the weights, beside them."""
    from cmae_scale.models.export import build_card, write_card
    from cmae_scale.models.formats.names import WHOSE

    facts = {"converted from": f"{file.path.name} ({WHOSE[file.layout]})"}
    facts |= {f"note {number}": notice for number, notice in enumerate(file.notices, start=1)}
    library: Library = "cmae-scale" if file.cfg.model.is_hybrid else LIBRARIES[args.to]
    card = build_card(args.out.name, facts=facts, library=library, license_name=args.license)
    write_card(args.out, card)


if __name__ == "__main__":
    sys.exit(main())
