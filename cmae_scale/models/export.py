"""What a pre-training run gives to others: RUN/encoder, with its card."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cmae_scale.config.run_file import Run
from cmae_scale.models.card import CARD_FILE, Library, build_card, describe_run, write_card
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
