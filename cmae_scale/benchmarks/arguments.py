"""The arguments of bench: a command for each trial."""

import argparse
from pathlib import Path

from cmae_scale.core.cli import Parser

RECORDS = Path("tests/bench/records")
PARTS = ("ema", "views", "attention", "tar", "checkpoint", "decode", "step", "remat", "engine", "start")


def build_bench_parser(description: str, *, examples: str) -> argparse.ArgumentParser:
    """A parser whose `trial` says which was asked for."""
    parser = Parser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        required=True, metavar="loader | stream | shards | memory | hybrid | kill | gpu | parts"
    )
    loader = commands.add_parser("loader", help="CPU seconds per sample beside other loaders")
    loader.set_defaults(trial="loader")
    loader.add_argument("--folder", type=Path, metavar="DIR", help="the same images as class folders")
    loader.add_argument("--samples", type=int, default=1000, help="of each round (default: 1000)")
    loader.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    loader.add_argument("--workers", type=int, default=2, help="threads or processes (default: 2)")
    loader.add_argument("--epochs", type=int, default=6, help="in which memory is watched (default: 6)")
    loader.add_argument("--record", type=Path, default=RECORDS / "loader.json", metavar="FILE")
    stream = commands.add_parser("stream", help="the same global batches for every world, as digests")
    stream.set_defaults(trial="stream")
    stream.add_argument("--epochs", type=int, default=2, help="default: 2")
    for command in (loader, stream):
        command.add_argument("--shards", nargs="+", required=True, metavar="DIR", help="as cmae.data.shards")
        command.add_argument("--batch", type=int, default=64, help="global batch (default: 64)")
        command.add_argument("--master_px", type=int, default=256, help="side of the crops (default: 256)")
    memory = commands.add_parser("memory", help="memory of real training beside what plan predicts")
    memory.set_defaults(trial="memory")
    memory.add_argument("--only", type=int, nargs="+", metavar="N", help="these of the cases, from 1")
    memory.add_argument("--record", type=Path, default=RECORDS / "memory.json", metavar="FILE")
    hybrid = commands.add_parser("hybrid", help="the hybrid encoder with and without hidden patches")
    hybrid.set_defaults(trial="hybrid")
    hybrid.add_argument("--batch", type=int, default=8, help="images of a pass (default: 8)")
    hybrid.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    hybrid.add_argument("--record", type=Path, default=RECORDS / "hybrid.json", metavar="FILE")
    kill = commands.add_parser("kill", help="a run killed at random moments ends as one never killed")
    kill.set_defaults(trial="kill")
    for command in (hybrid, kill):
        command.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the run file")
        command.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="as for a run")
    kill.add_argument("--kills", type=int, default=30, help="default: 30")
    kill.add_argument("--ranks", type=int, default=2, help="processes on this machine (default: 2)")
    kill.add_argument("--seed", type=int, default=0, help="of victims and moments (default: 0)")
    kill.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="for the runs' folders")
    shards = commands.add_parser("shards", help="seconds per image of make_shards, of decoding, of copying")
    shards.set_defaults(trial="shards")
    shards.add_argument("--folder", type=Path, required=True, metavar="DIR", help="images as class folders")
    shards.add_argument("--scratch", type=Path, metavar="DIR", help="disk to write to (default: temporary)")
    shards.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    shards.add_argument("--record", type=Path, default=RECORDS / "shards.json", metavar="FILE")
    gpu = commands.add_parser("gpu", help="what a GPU computes, how fast, and what it holds")
    gpu.set_defaults(trial="gpu")
    gpu.add_argument("--quick", action="store_true", help="fewer sizes, half the time limits")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny rehearsal")
    gpu.add_argument("--shards", nargs="+", default=[], metavar="DIR", help="to measure the loader with")
    gpu.add_argument("--record", type=Path, default=RECORDS / "gpu.json", metavar="FILE")
    parts = commands.add_parser("parts", help="parts of a step beside the usual way to write them")
    parts.set_defaults(trial="parts")
    parts.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; default: all"
    )
    parts.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    parts.add_argument("--record", type=Path, default=RECORDS / "parts.json", metavar="FILE")
    return parser
