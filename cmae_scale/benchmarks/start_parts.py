"""How long commands take to start, in processes of their own."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from cmae_scale.benchmarks.timing import Part, Scale, Way
from cmae_scale.core.errors import ConfigError

QUICKSTART = "ds_configs/quickstart.json"
TYPO = "cmae.model.encodr=vit_small"


def prepare_start(scale: Scale) -> Iterator[Part]:
    """Help, a plan, a typo that is refused, a whole run of one step; what importing libraries takes of it."""
    with TemporaryDirectory() as scratch:
        ways: dict[str, Way] = {
            "pretrain, its help": lambda: _run("cmae_scale.pretrain", "--help"),
            "pretrain, a typo refused": lambda: _run(
                "cmae_scale.pretrain", "--deepspeed_config", QUICKSTART, "--set", TYPO, status=2
            ),
            "plan": lambda: _run("cmae_scale.plan", "--deepspeed_config", QUICKSTART, "--images", "1437"),
        }
        if not scale.is_tiny:
            shards = Path(scratch, "shards")
            _run("data_prep.make_shards", "--source", "digits", "--out", str(shards))
            ways["pretrain, a run of one step"] = lambda: _train(shards, Path(scratch))
            ways["importing torch"] = lambda: _call("-c", "import torch")
            ways["importing torch and deepspeed"] = lambda: _call("-c", "import torch, deepspeed")
        yield Part(ways, 1, "start")


def _train(shards: Path, scratch: Path) -> None:
    """One step of the quickstart, in a new folder each time."""
    with TemporaryDirectory(dir=scratch) as out:
        changes = [f"cmae.data.shards={shards}/train", f"cmae.data.val_shards={shards}/val"]
        changes += ["cmae.schedule.duration=1st", "cmae.schedule.warmup=0st"]
        arguments = ["--deepspeed_config", QUICKSTART, "--out", out, "--set", *changes]
        _run("cmae_scale.pretrain", *arguments)


def _run(module: str, *arguments: str, status: int = 0) -> None:
    _call("-m", module, *arguments, status=status)


def _call(*arguments: str, status: int = 0) -> None:
    """Start Python and wait for it."""
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)  # noqa: S603
    if ended.returncode != status:
        told = (ended.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise ConfigError(f"`python {' '.join(arguments)}` ended with {ended.returncode} ({told})")
