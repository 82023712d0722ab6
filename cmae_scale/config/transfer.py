"""The "transfer" object of a run file: what is measured of an encoder, and how it is trained for that.

"Official" is the authors' released fine-tuning (ZhichengHuang/CMAE), "MAE" is facebookresearch/mae.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cmae_scale.config.cmae import (
    Attention,
    CheckpointConfig,
    DataConfig,
    Duration,
    FaultsConfig,
    Fraction,
    KnnConfig,
    Pool,
    PositiveFloat,
    ScheduleConfig,
    Section,
)


class StartConfig(Section):
    """The encoder that everything starts from."""

    place: str = Field(min_length=1)  # a run, a folder such as RUN/encoder, a file of MAE, ConvMAE, CMAE or
    # Hugging Face, or "timm:NAME"
    num_heads: int | None = Field(None, ge=1)  # of a file of no published size; null = as published
    random: bool = False  # only its architecture counts: weights are drawn anew, as pre-training starts
    attention: Attention = "auto"
    remat: Literal["none", "full"] = "none"  # full: keep block inputs only, compute the rest again


class LinearConfig(Section):
    """A linear classifier on frozen features after a batch norm without weights. Source: MAE A.1."""

    pool: Pool = "cls"  # Source: MAE main_linprobe.py --cls_token; mean: of the normed patch tokens
    sweep: tuple[PositiveFloat, ...] = Field(
        (1.0,), min_length=1
    )  # one head for each, trained side by side with this multiple of the learning rate
    features: Literal["fresh", "once"] = "fresh"  # once: of centred images, computed before training; else of
    # a new crop in every epoch, as MAE


class FinetuneConfig(Section):
    """Training a part of the encoder or all of it, with a classifier on top."""

    blocks: int | None = Field(None, ge=0)  # only the last so many and the head; null = everything
    pool: Pool = "mean"  # mean: of the patch tokens, then a new norm. Source: official config
    layer_decay: float = Field(
        0.65, gt=0, le=1
    )  # lr of a layer / lr of the one above. Source: official config
    drop_path: float = Field(0.1, ge=0, lt=1)  # of the last block, falling linearly. Source: official config
    head_std: float = Field(2e-5, ge=0)  # Source: official config, MAE main_finetune.py
    ema: float = Field(
        0.0, ge=0, lt=1
    )  # share kept by a moving average of the weights, which is then what is
    # evaluated and exported; 0 = none. Source: 0 as official and MAE
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"  # timm's spelling; null = none. Source: MAE, official
    erase_p: Fraction = 0.25  # Source: MAE, official config
    erase_area: tuple[float, float] = (0.02, 1 / 3)  # share of the image. Source: timm, official config
    mixup: float = Field(0.8, ge=0)  # of the beta distribution; 0 = none. Source: MAE, official config
    cutmix: float = Field(1.0, ge=0)  # as mixup
    switch_p: Fraction = 0.5  # probability of cutmix where both are on
    mix_rows: int = Field(
        128, ge=2, multiple_of=2
    )  # rows of the global batch that share one draw of mixup or
    # cutmix. Source: official config, batch of a GPU
    smoothing: float = Field(0.1, ge=0, lt=1)  # of labels. Source: MAE, official config

    @model_validator(mode="after")
    def _ranges(self) -> "FinetuneConfig":
        if not 0 < self.erase_area[0] <= self.erase_area[1] < 1:
            raise ValueError(f"erase_area must be 0 < low <= high < 1, not {list(self.erase_area)}")
        if self.rand_augment is not None and not self.rand_augment.startswith("rand-"):
            raise ValueError(f'rand_augment "{self.rand_augment}": write for instance "rand-m9-mstd0.5-inc1"')
        return self

    @property
    def has_mixing(self) -> bool:
        """Whether images are mixed in pairs at all."""
        return self.mixup > 0 or self.cutmix > 0


class TaskConfig(Section):
    """What is done with the encoder: exactly one of these."""

    knn: KnnConfig | None = None
    linear: LinearConfig | None = None
    finetune: FinetuneConfig | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "TaskConfig":
        asked = [name for name in TaskConfig.model_fields if getattr(self, name) is not None]
        if len(asked) != 1:
            raise ValueError(
                f"write exactly one of knn, linear, finetune, not {' and '.join(asked) or 'none'}"
            )
        return self

    @property
    def name(self) -> str:
        """Which one it is."""
        return next(name for name in TaskConfig.model_fields if getattr(self, name) is not None)


class TransferDataConfig(DataConfig):
    """Labelled shards to learn from and others to be judged by."""

    val_shards: str | tuple[str, ...] = Field(min_length=1)  # type: ignore[assignment] # here it must be given
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # only the first part of every shard (they are
    # shuffled when made): 0.01 and 0.1 are the usual low-shot figures


class CropConfig(Section):
    """How images are cut: at random for training, centred for everything else."""

    img_px: int = Field(224, ge=1)
    scale: tuple[float, float] = (0.08, 1.0)  # share of the area. Source: timm, MAE, official config
    ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height
    flip_p: Fraction = 0.5
    centre: float = Field(0.875, gt=0, le=1)  # img_px / the short side before the centre crop: 224 of 256
    mean: tuple[float, float, float] | None = None  # of RGB in [0, 1]; null = the encoder's own
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None

    @model_validator(mode="after")
    def _ranges(self) -> "CropConfig":
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two numbers 0 < low <= high, not {[low, high]}")
        if self.scale[1] > 1:
            raise ValueError(f"scale {list(self.scale)} is a share of the area: at most 1")
        return self

    @property
    def short_px(self) -> int:
        """Short side of an image before its centre is cut out."""
        return round(self.img_px / self.centre)


class TransferScheduleConfig(ScheduleConfig):
    """Linear warm-up, then cosine, per optimizer step."""

    base_lr: float = Field(5e-4, gt=0)  # Source: official config for a 300-epoch encoder; 2.5e-4 for 1600
    duration: Duration = "100ep"
    warmup: Duration = "5ep"
    min_lr: float = Field(1e-6, ge=0)
    min_lr_rule: Literal["absolute", "scaled"] = "absolute"  # absolute: the same floor for every layer
    # (official); scaled: times the layer's own factor (MAE)


class TransferMonitorConfig(Section):
    """What is written while training."""

    log_every: int = Field(20, ge=1)  # optimizer steps per line of metrics.jsonl
    evaluate_every: Duration = "1ep"  # and at the end
    breakdown: bool = False  # as cmae.monitor.breakdown
    profile: Annotated[str, Field(pattern=r"^[1-9]\d*(-[1-9]\d*)?$")] | None = None  # as cmae.monitor.profile
    batch: int = Field(256, ge=1)  # images of a forward pass of evaluation on a rank. Does not change results


class TransferConfig(Section):
    """Everything about the run that is not DeepSpeed's."""

    encoder: StartConfig
    task: TaskConfig
    data: TransferDataConfig
    crop: CropConfig = CropConfig()
    schedule: TransferScheduleConfig = TransferScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: TransferMonitorConfig = TransferMonitorConfig()
    faults: FaultsConfig = FaultsConfig()
    out: str | None = None  # run folder; null = runs/<name of the run file>
    seed: int = Field(0, ge=0)  # Source: MAE main_finetune.py
