"""What a run gives to others: RUN/encoder and its README.md, which says what it is and how to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.run_file import Run
from cmae_scale.core.credentials import MASK, mask
from cmae_scale.core.files import write_text
from cmae_scale.models.weights import export_encoder


def export_run(run: Run, weights: Mapping[str, Tensor], *, metrics: Mapping[str, Any]) -> None:
    """Write the online encoder's `weights` to RUN/encoder.

    Its card tells `metrics`, the last line of metrics.jsonl; with none, an older card stays.
    """
    folder, model = run.out / "encoder", run.cmae.model
    export_encoder(weights, folder, model=model, views=run.cmae.views)
    if metrics or not (folder / CARD_FILE).exists():
        facts = describe_run(run, metrics=metrics)
        library: Library = "cmae-scale" if model.is_hybrid else "timm"
        write_card(folder, build_card(run.out.name, facts=facts, library=library))


CARD_FILE = "README.md"
MARK = "<!-- written by cmae-scale, and written anew by it: take this line out to keep changes -->"
Library = Literal["timm", "transformers", "cmae-scale"]
UNKNOWN = "unknown"  # the Hub's word for a licence that nobody has stated
PAPER = "[CMAE](https://arxiv.org/abs/2207.13532)"

_LOADING: dict[Library, str] = {
    "timm": """\
import timm

encoder = timm.create_model("local-dir:FOLDER", pretrained=True)  # "hf-hub:USER/NAME" on the Hub
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))""",
    "transformers": """\
from transformers import AutoModel

model = AutoModel.from_pretrained("FOLDER")  # "USER/NAME" on the Hub""",
    "cmae-scale": """\
from cmae_scale.models import read_description, read_encoder

encoder = read_encoder("FOLDER")  # encoder(images, None) gives a token for every patch
prepared = read_description("FOLDER")  # img_px, mean, std of its images""",
}


def build_card(title: str, *, facts: Mapping[str, str], library: Library, license_name: str = UNKNOWN) -> str:
    """Markdown with the Hub's front matter. `facts` are rows of a table, in their order."""
    rows = "\n".join(f"| {name} | {value.replace('|', '/')} |" for name, value in facts.items())
    return f"""\
---
license: {license_name}
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- self-supervised-learning
- masked-autoencoder
- cmae
---

{MARK}

# {title}

| | |
|---|---|
{rows}

```python
{_LOADING[library]}
```
"""


def describe_run(run: Run, *, metrics: Mapping[str, Any]) -> dict[str, str]:
    """The card's rows for a finished run; `metrics` is the last line of its metrics.jsonl, or empty.

    Of the shards only the last two parts of their paths are told.
    """
    cfg, batch = run.cmae, run.deepspeed["train_batch_size"]
    steps = metrics.get("step")
    seen = f", {metrics['samples']:,} images seen in {steps:,} steps" if steps else ""
    facts = {
        "encoder": _describe_encoder(cfg),
        "method": _describe_method(cfg),
        "images": f"RGB, {cfg.views.img_px} px, mean {list(cfg.views.mean)}, std {list(cfg.views.std)}",
        "data": ", ".join(_shorten(place, parts=2) for place in _places(cfg)),
        "schedule": f"{cfg.schedule.duration} in batches of {batch}{seen}",
        "optimizer": f"{run.deepspeed['optimizer']['type']}, peak learning rate {run.peak_lr:.3g}",
        "masking": f"{cfg.mask.ratio:.0%} hidden in cells of {cfg.mask.cell} x {cfg.mask.cell} patches",
    }
    if cfg.model.init:
        facts["started from"] = _shorten(cfg.model.init, parts=1)
    losses = [f"{name} {metrics[name]:.4f}" for name in ("loss", "pixel", "contrast") if name in metrics]
    facts["last training losses"] = ", ".join(losses) or "not known"
    facts["evaluation"] = "none is recorded here"
    return facts


def write_card(folder: Path, text: str) -> None:
    """Put the card into the folder; one that somebody has made their own stays."""
    path = folder / CARD_FILE
    if not path.is_file() or MARK.encode() in path.read_bytes():
        write_text(path, text)


def _describe_encoder(cfg: CmaeConfig) -> str:
    kind = "hybrid convolutional vision transformer" if cfg.model.is_hybrid else "vision transformer"
    size = cfg.model.encoder or f"{cfg.model.embed_dim} wide, {cfg.model.depth} deep"
    return f"{kind}, {size}, patches of {cfg.model.patch_size} px"


def _describe_method(cfg: CmaeConfig) -> str:
    if not cfg.has_contrast:
        return "masked autoencoder, trained with cmae-scale"
    return f"{PAPER}: masked autoencoder with a {cfg.loss.contrast} loss, trained with cmae-scale"


def _shorten(place: str, *, parts: int) -> str:
    address = mask(place).replace(f"{MASK}@", "").partition("?")[0]
    return "/".join(Path(address).parts[-parts:])


def _places(cfg: CmaeConfig) -> tuple[str, ...]:
    shards = cfg.data.shards
    return (shards,) if isinstance(shards, str) else shards
