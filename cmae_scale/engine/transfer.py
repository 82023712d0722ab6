"""A task as the loop knows it: what a step does with a rank's images, and what follows its update."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.config.batches import BatchSizes
from cmae_scale.core.errors import ConfigError
from cmae_scale.data.stream import CropBatch, copy_ahead
from cmae_scale.engine.checkpoint.metadata import DataOrder, build_metadata
from cmae_scale.engine.ema import Pair
from cmae_scale.engine.metrics.health import Health
from cmae_scale.engine.precision import Settled, read_precision
from cmae_scale.engine.process.group import RankContext
from cmae_scale.engine.train_state import TrainState, count_trainable, name_precision, start_train_state
from cmae_scale.engine.zero.partitions import gather_weights
from cmae_scale.layers.attention import describe_attention


class Task(Protocol):
    """As much of tasks.task.Task as training needs."""

    @property
    def model(self) -> nn.Module:
        """The network."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of what `losses` gives."""

    @property
    def image_flops(self) -> int:
        """Of a training step."""

    def groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""

    def prepare(self, part: CropBatch, *, step: int, first_row: int, total: int) -> tuple[Tensor, Tensor]:
        """Input and target of a micro-batch."""

    def losses(self, output: Tensor, target: Tensor) -> Float[Tensor, " metrics"]:
        """Means over the micro-batch; the first is minimised."""


@dataclass(frozen=True)
class Transfer:
    """The training of a task as the method of a run (see loop.TrainTask).

    `ema_params` are the moving averages of the trained weights, where the run file asks for them.
    """

    state: TrainState
    batch: BatchSizes
    task: Task
    ema: float = 0.0
    ema_params: Mapping[str, nn.Parameter] = field(default_factory=dict)
    health: Health | None = None  # of its losses alone, nothing more is measured

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The task's."""
        return self.task.metric_names

    @property
    def image_flops(self) -> int:
        """The task's."""
        return self.task.image_flops

    def take_step(
        self, crops: Sequence[CropBatch], *, step: int, update: Callable[[Tensor], bool]
    ) -> Float[Tensor, " metrics"]:
        """One optimizer step on this rank's micro-batches; the means of their losses."""
        engine, batch = self.state.engine, self.batch
        first_row = self.state.context.world.rank * batch.local
        dtype = read_precision(self.state.run.deepspeed).parameters
        means = []
        for number, part in enumerate(copy_ahead(crops, self.state.context.device), start=1):
            inputs, target = self.task.prepare(part, step=step, first_row=first_row, total=batch.total)
            losses = self.task.losses(engine(inputs.to(dtype)), target)
            engine.backward(losses[0])
            if number < len(crops):
                engine.step()
            means.append(losses.detach())
            first_row += batch.micro
        mean = torch.stack(means).mean(dim=0)
        if update(mean):
            with self.state.timer.span("ema"):
                self.state.ema.update_(self.ema)
        return mean

    def scheduled(self, step: int) -> dict[str, float]:
        """Nothing but the learning rate."""
        return {}

    def gather(self) -> dict[str, Tensor]:
        """The network's weights, or their moving average, in fp32 on the CPU; all ranks call it together."""
        state = gather_weights(self.state.engine.module)
        ema_params = {name: value.detach().float().cpu() for name, value in self.ema_params.items()}
        return {**state, **ema_params}


def start_transfer(
    settled: Settled,
    *,
    context: RankContext,
    task: Task,
    batch: BatchSizes,
    data_order: DataOrder,
    ema: float = 0.0,
) -> Transfer:
    """The training of `task` at the run folder's newest checkpoint, or at step 0. The run is resolved."""
    run = settled.run
    stage = run.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if ema and stage == 3:
        raise ConfigError("transfer.task.finetune.ema needs whole weights: write zero_optimization.stage=2")
    decay = run.deepspeed["optimizer"]["params"].get("weight_decay", 0.0)
    pairs: list[Pair] = []
    if ema:
        trained = [(name, value) for name, value in task.model.named_parameters() if value.requires_grad]
        pairs = [(name, value, _copy(value, context.device)) for name, value in trained]
    settings = json.loads(run.transfer.model_dump_json(include={"encoder", "task", "crop"}))
    for free in ("attention", "remat"):  # change speed and memory, not the result
        del settings["encoder"][free]
    state = start_train_state(
        run,
        context=context,
        model=task.model,
        pairs=pairs,
        attention=settled.attention,
        metadata=build_metadata(
            run,
            kind={
                "train_batch_size": batch.total,
                "seed": run.transfer.seed,
                "data": data_order,
                **settings,
            },
            ranks=context.world.size,
            precision=name_precision(read_precision(run.deepspeed)),
            attention=settled.record,
        ),
        groups=task.groups(weight_decay=decay),
    )
    return Transfer(state, batch, task, ema, {name: shadow for name, _, shadow in pairs})


def describe_transfer(state: TrainState, *, images: int, held_out: int, steps: int) -> str:
    """What runs, in a few lines."""
    cfg, model = state.run.transfer, state.engine.module
    total = state.run.deepspeed["train_batch_size"]
    lines = [
        f"{cfg.task.name} of {cfg.encoder.place}: {count_trainable(model) / 1e6:.2f} M trainable parameters",
        f"{images:,} images, {held_out:,} held out, {steps} steps of {total}",
        f"{state.context.world.size} x {state.context.device.type}, ZeRO {state.metadata.zero_stage}, "
        f"{state.metadata.precision}, attention {describe_attention(state.attention)}",
        f"run folder {state.run.out}" + (f", resumed at step {state.first_step}" if state.first_step else ""),
    ]
    return "\n".join([*lines, *state.notices])


def _copy(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(device, torch.float32, copy=True), requires_grad=False)
