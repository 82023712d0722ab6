"""DeepSpeed's monitors (wandb, tensorboard, csv): what must be settled before it opens them."""

import os
from typing import Any


def settle_monitors(settings: dict[str, Any]) -> list[str]:
    """Send wandb offline when nobody is logged in, for DeepSpeed would end the run. Returns what to say."""
    if not settings.get("wandb", {}).get("enabled", False):
        return []
    import wandb

    if "WANDB_MODE" in os.environ or wandb.api.api_key is not None:
        return []
    os.environ["WANDB_MODE"] = "offline"
    wandb.teardown()  # it has read the environment already: let it do so again
    return ["wandb: nobody is logged in, so this run is logged offline (wandb login, wandb sync wandb/*)"]
