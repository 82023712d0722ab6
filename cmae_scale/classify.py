"""Say what is on images, by a model that cmae_scale.transfer has exported (or any timm classifier)."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.core.cli import Parser, read_count, run_command
from cmae_scale.core.errors import DataError
from cmae_scale.core.terminal import tell

EXAMPLES = """\
  python -m cmae_scale.classify --model runs/finetune_vitb cat.jpg dog.png
  python -m cmae_scale.classify --model runs/finetune_vitb/model --top 1 --json photos
  find . -name "*.jpg" -newer yesterday | python -m cmae_scale.classify --model runs/finetune_vitb -"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    return run_command(classify, argv)


def classify(argv: Sequence[str] | None) -> None:
    """A line for each guess, or a JSON object, of each image; DataError at the end if some are none."""
    args = read_arguments(argv)

    from cmae_scale.tasks.classify import classify_file, find_images, open_classifier

    classifier = open_classifier(args.model)
    total = failed = 0
    for path in find_images(args.images, listed=sys.stdin.buffer):
        total += 1
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        try:
            guesses = classify_file(classifier, path, count=args.top)
        except DataError as error:
            failed += 1
            tell(f"error: {shown}: {error}", to=sys.stderr)
            if args.json:
                tell(json.dumps({"image": shown, "error": str(error)}))
            continue
        if args.json:
            tell(json.dumps({"image": shown, "guesses": dict(guesses)}))
        else:
            tell("\n".join([shown, *(f"  {share:7.2%}  {name}" for name, share in guesses)]))
    if failed or not total:
        raise DataError(
            f"{failed} of {total} images could not be classified" if total else "no image was named"
        )


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The model and the images."""
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a transfer run, or its folder model/")
    parser.add_argument("--top", type=read_count, default=5, metavar="K", help="guesses of each image (5)")
    parser.add_argument("--json", action="store_true", help="one JSON object per image")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder with images at any depth, or - for a list on standard input, one a line",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
