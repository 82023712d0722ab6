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

    place: str = Field(min_length=1)
    """Where the encoder is: a run, a folder such as RUN/encoder, a file of MAE, ConvMAE, CMAE or Hugging
    Face, or "timm:NAME".
    """
    num_heads: int | None = Field(None, ge=1)
    """Attention heads in a file of no published size, which no file says; null = as published."""
    random: bool = False
    """Use the architecture only and draw weights anew, as pre-training starts."""
    attention: Attention = "auto"
    """Explicit products, or a fused kernel by name; auto = what is fastest in a short trial."""
    remat: Literal["none", "full"] = "none"
    """What is computed again in the backward pass instead of kept: none, or full (all but the blocks'
    inputs).
    """


class LinearConfig(Section):
    """A linear classifier on frozen features after a batch norm without weights. Source: MAE A.1."""

    pool: Pool = "cls"
    """How an image's tokens become one feature: the class token, or the mean of the normed patch tokens.
    Source: MAE main_linprobe.py --cls_token.
    """
    sweep: tuple[PositiveFloat, ...] = Field((1.0,), min_length=1)
    """One head for each, trained side by side, with this multiple of the learning rate."""
    features: Literal["fresh", "once"] = "fresh"
    """fresh: of a new crop in every epoch, as MAE; once: of centred images, computed before training."""


class FinetuneConfig(Section):
    """Training a part of the encoder or all of it, with a classifier on top."""

    blocks: int | None = Field(None, ge=0)
    """Train only the last so many blocks and the head; null = everything."""
    pool: Pool = "mean"
    """How an image's tokens become one feature: mean of the patches', then a new norm, or the class token.
    Source: official config.
    """
    layer_decay: float = Field(0.65, gt=0, le=1)
    """Learning rate of a layer / that of the layer above. Source: official config."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Rate of drop path in the last block, falling linearly to 0 in the first. Source: official config."""
    head_std: float = Field(2e-5, ge=0)
    """Standard deviation of the head's starting weights. Source: official config, MAE main_finetune.py."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Share kept by a moving average of the weights, which is then evaluated and exported; 0 = none. Source:
    0 as official and MAE.
    """
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's spelling; null = none. Source: MAE, official config."""
    erase_p: Fraction = 0.25
    """Probability of random erasing. Source: MAE, official config."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    """Range of the erased area as a share of the image's. Source: timm, official config."""
    mixup: float = Field(0.8, ge=0)
    """Parameter of mixup's beta distribution; 0 = none. Source: MAE, official config."""
    cutmix: float = Field(1.0, ge=0)
    """Parameter of cutmix's beta distribution; 0 = none. Source: MAE, official config."""
    switch_p: Fraction = 0.5
    """Probability of cutmix where both are on."""
    mix_rows: int = Field(128, ge=2, multiple_of=2)
    """Rows of the global batch that share one draw of mixup or cutmix. Source: official config, batch of a
    GPU.
    """
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing. Source: MAE, official config."""

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
    """Nearest neighbours of frozen features."""
    linear: LinearConfig | None = None
    """A linear classifier on frozen features."""
    finetune: FinetuneConfig | None = None
    """Training a part of the encoder or all of it."""

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
    """Labelled shards to learn from and others to be evaluated on."""

    val_shards: str | tuple[str, ...] = Field(min_length=1)  # type: ignore[assignment]
    """Labelled shards that the network is evaluated on."""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Use only the first part of every shard (they are shuffled when made): 0.01 and 0.1 are the usual low-
    shot figures.
    """


class CropConfig(Section):
    """How images are cut: at random for training, centred for everything else."""

    img_px: int = Field(224, ge=1)
    """Side of an image as the network sees it, px."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of a training crop's area as a share of the image's. Source: timm, MAE, official config."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of a training crop's width / height."""
    flip_p: Fraction = 0.5
    """Probability of a horizontal flip in training."""
    centre: float = Field(0.875, gt=0, le=1)
    """img_px / the short side before the centre crop of evaluation: 224 of 256."""
    mean: tuple[float, float, float] | None = None
    """Mean of RGB in [0, 1], subtracted from images; null = the encoder's own."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation of RGB in [0, 1], by which images are divided; null = the encoder's own."""

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

    base_lr: float = Field(5e-4, gt=0)
    """Learning rate at batch 256: "lr": "auto" is base_lr * train_batch_size / 256. Source: official config
    for a 300-epoch encoder; 2.5e-4 for 1600.
    """
    duration: Duration = "100ep"
    """Length of the run: epochs, steps or samples, as "100ep", "5000st", "1.5Msamples"."""
    warmup: Duration = "5ep"
    """Length of the linear warm-up, or a share of the run ("2%")."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end."""
    min_lr_rule: Literal["absolute", "scaled"] = "absolute"
    """absolute: the same floor for every layer (official); scaled: times the layer's own factor (MAE)."""


class TransferMonitorConfig(Section):
    """What is written while training."""

    log_every: int = Field(20, ge=1)
    """Optimizer steps per line of metrics.jsonl."""
    evaluate_every: Duration = "1ep"
    """Time between two evaluations; there is always one at the end."""
    breakdown: bool = False
    """Milliseconds per step of data, augment, forward, backward and the rest in each line."""
    profile: Annotated[str, Field(pattern=r"^[1-9]\d*(-[1-9]\d*)?$")] | None = None
    """Steps such as "10-12", counted as in metrics.jsonl, of which rank 0 writes a torch profiler trace to
    RUN/profile; null = none.
    """
    batch: int = Field(256, ge=1)
    """Images of a forward pass of evaluation on a rank. Changes no result."""


class TransferConfig(Section):
    """Everything about the run that is not DeepSpeed's."""

    encoder: StartConfig
    """The encoder that everything starts from."""
    task: TaskConfig
    """What is done with it."""
    data: TransferDataConfig
    """Labelled images."""
    crop: CropConfig = CropConfig()
    """How images are cut."""
    schedule: TransferScheduleConfig = TransferScheduleConfig()
    """Length and learning rate."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is saved, and how a run goes on."""
    monitor: TransferMonitorConfig = TransferMonitorConfig()
    """What is measured and written."""
    faults: FaultsConfig = FaultsConfig()
    """What happens when something goes wrong."""
    out: str | None = None
    """The run folder; null = runs/<name of the run file>."""
    seed: int = Field(0, ge=0)
    """Seed of the head, the data order and the augmentation. Source: MAE main_finetune.py."""
