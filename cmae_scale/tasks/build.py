"""From a run file to what it asks for: the labelled data, the evaluator, the encoder and the task."""

import math
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from cmae_scale.config.batches import BatchSizes
from cmae_scale.config.cmae import Pool
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.collectives import find_together
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.world import World
from cmae_scale.data.decoding import BadSamples
from cmae_scale.data.mix import MixPlan, plan_data
from cmae_scale.data.ordered import count_samples
from cmae_scale.data.rand_augment import TrainingCrops, build_rand_augment
from cmae_scale.data.shard_set import Labelled, open_labelled
from cmae_scale.data.stream import open_stream
from cmae_scale.layers.attention import AttentionChoice, AttentionShape
from cmae_scale.models.networks import build_network, count_tokens, draw_weights, list_blocks
from cmae_scale.models.pretrained import PretrainedEncoder, open_encoder
from cmae_scale.tasks.encode import build_preprocessor
from cmae_scale.tasks.evaluator import Evaluator
from cmae_scale.tasks.features import Preprocessor
from cmae_scale.tasks.finetune import Finetuning, build_finetuning
from cmae_scale.tasks.linear import LinearProbing, build_probing


@dataclass(frozen=True)
class TransferContext:
    """What every task needs, on this rank."""

    cfg: TransferConfig
    encoder: PretrainedEncoder
    preprocessor: Preprocessor
    evaluator: Evaluator

    @property
    def train_samples(self) -> list[int]:
        """How many images of each training shard are used."""
        return count_samples(self.evaluator.labelled.train, self.cfg.data.train_fraction)

    @property
    def widest(self) -> tuple[int, int]:
        """Outer and inner size of the encoder's largest matrix."""
        matrices = (tuple(weight.shape) for weight in self.encoder.state.values() if weight.dim() == 2)
        outer, inner = max(matrices, key=math.prod)
        return outer, inner

    @property
    def attention_shape(self) -> AttentionShape:
        """What the network's attention works on."""
        with torch.device("meta"):
            network = build_network(
                replace(self.encoder, state={}), img_px=self.cfg.crop.img_px, pool=probe_pool(self.cfg)
            )
        attention = list_blocks(network)[1][0].attn
        return AttentionShape(
            attention.num_heads,
            attention.head_dim,
            count_tokens(network),
            images=self.cfg.monitor.batch,
            is_trained=self.cfg.task.finetune is not None,
        )

    def compute_in(self, compute: torch.dtype, attention: AttentionChoice) -> "TransferContext":
        """The same, its network computing so."""
        return replace(self, preprocessor=replace(self.preprocessor, compute=compute, attention=attention))


def open_context(cfg: TransferConfig, *, world: World, device: torch.device) -> TransferContext:
    """Encoder and data, opened and compared; the network computes in fp32 until it is told otherwise."""
    data = cfg.data
    labelled = find_together(
        lambda: open_labelled(data.shards, data.val_shards, data=data, measure=world.is_first_of_node),
        fingerprint=Labelled.fingerprint,
    )
    start = cfg.encoder
    encoder = open_encoder(start.place, with_weights=not start.random, num_heads=start.num_heads)
    if start.random:
        encoder = draw_weights(encoder, seed=cfg.seed)
    preprocessor = build_preprocessor(encoder, cfg.crop, device=device, compute=torch.float32)
    evaluator = Evaluator(labelled, cfg.data, cfg.crop, cfg.monitor.batch, world, device)
    return TransferContext(cfg, encoder, preprocessor, evaluator)


def build_task(context: TransferContext, *, batch: BatchSizes) -> Finetuning | LinearProbing:
    """The task with its network. ConfigError where the batch cannot be mixed in pairs."""
    cfg, classes = context.cfg, context.evaluator.labelled.classes
    if cfg.task.linear is not None:
        return build_probing(
            context.encoder,
            cfg.task.linear,
            crop=cfg.crop,
            classes=classes,
            preprocessor=context.preprocessor,
            seed=cfg.seed,
        )
    finetune = cfg.task.finetune
    assert finetune is not None
    if finetune.has_mixing and batch.micro % 2:
        raise ConfigError(
            "mixup and cutmix mix images in pairs, and train_micro_batch_size_per_gpu is "
            f"{batch.micro}: write an even one, or set mixup and cutmix of transfer.task.finetune to 0"
        )
    return build_finetuning(
        context.encoder,
        finetune,
        crop=cfg.crop,
        classes=classes,
        preprocessor=context.preprocessor,
        seed=cfg.seed,
        has_remat=cfg.encoder.remat == "full",
    )


def plan_training(context: TransferContext, *, batch: BatchSizes) -> MixPlan:
    """Which samples form which step."""
    return plan_data(
        context.evaluator.labelled.train,
        context.cfg.data,
        global_batch=batch.total,
        seed=context.cfg.seed,
        samples=context.train_samples,
    )


def open_training(
    context: TransferContext,
    task: Finetuning | LinearProbing,
    plan: MixPlan,
    *,
    batch: BatchSizes,
    steps: range,
    bad: BadSamples,
) -> AbstractContextManager[Any]:
    """This rank's micro-batches: crops, or features where the run file wants them computed once."""
    cfg, evaluator = context.cfg, context.evaluator
    if isinstance(task, LinearProbing) and task.cfg.features == "once":
        fraction = cfg.data.train_fraction
        return closing(
            task.open_features(
                evaluator, fraction=fraction, batch=batch.total, accumulation=batch.accumulation, steps=steps
            )
        )
    spelling = cfg.task.finetune.rand_augment if cfg.task.finetune is not None else None
    augmentation = None
    if spelling is not None:
        augmentation = build_rand_augment(spelling, img_px=cfg.crop.img_px, mean=context.preprocessor.mean)
    return open_stream(
        evaluator.labelled.train,
        plan,
        decoding=TrainingCrops(cfg.crop, cfg.data.max_image_mpx, augmentation),
        data=cfg.data,
        rank=evaluator.world.rank,
        ranks=evaluator.world.size,
        accumulation=batch.accumulation,
        first_step=steps.start,
        end_step=steps.stop,
        pin=evaluator.device.type == "cuda",
        bad=bad,
    )


def probe_pool(cfg: TransferConfig) -> Pool:
    """How the task pools tokens."""
    task = cfg.task.knn or cfg.task.linear or cfg.task.finetune
    assert task is not None
    return task.pool
