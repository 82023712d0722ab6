"""Say what is on images, by a model that cmae_scale.transfer has exported (or any timm classifier)."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import DataError

EXAMPLES = """\
  python -m cmae_scale.classify --model runs/finetune_vitb/model cat.jpg dog.png
  python -m cmae_scale.classify --model runs/finetune_vitb/model --top 1 --json photos/*.jpg"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    return run_command(classify, argv)


def classify(argv: Sequence[str] | None) -> None:
    """A line for each guess of each image, or one JSON object per image."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="RUN/model of a transfer run")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="guesses of each image (5)")
    parser.add_argument("--json", action="store_true", help="one JSON object per image")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    args = parser.parse_args(argv)

    from cmae_scale.tasks.classify import guess, open_classifier

    classifier = open_classifier(args.model)
    for path in map(Path, args.images):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        try:
            guesses = guess(classifier, data, count=args.top)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if args.json:
            print(json.dumps({"image": str(path), "guesses": dict(guesses)}))
        else:
            print(path)
            for name, probability in guesses:
                print(f"  {probability:7.2%}  {name}")


if __name__ == "__main__":
    sys.exit(main())
