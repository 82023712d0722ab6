"""The "cmae" object of a run file: every setting of the method, its default and where that is from.

"Official" is the authors' released code (ZhichengHuang/CMAE), "paper" is arXiv:2207.13532. They differ in
places; the defaults follow the official code, because the paper's text alone was reported to fall short.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Duration = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(ep|st|[kMG]?samples|%)$")]

EncoderName = Literal[
    "vit_tiny",
    "vit_small",
    "vit_base",
    "vit_large",
    "vit_huge",
    "convvit_small",
    "convvit_base",
    "convvit_large",
]
Attention = Literal["auto", "explicit", "flash", "efficient", "cudnn", "math"]
Remat = Literal["none", "selective", "full"]
Pool = Literal["mean", "cls"]  # of an image's tokens: the patches' mean, or the class token


class Section(BaseModel):
    """One object of the run file: unknown names are errors, values keep their JSON type, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DecoderConfig(Section):
    """A light transformer over all patches, fed with the encoder's visible tokens and mask tokens."""

    depth: int = Field(8, ge=0)  # blocks. Source: MAE (arXiv:2111.06377) table 1a; official config
    embed_dim: int = Field(512, ge=4, multiple_of=4)  # Source: MAE table 1b. Four: row/column x sin/cos
    num_heads: int = Field(16, ge=1)  # Source: facebookresearch/mae models_mae.py
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> "DecoderConfig":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        return self


class PixelDecoderConfig(DecoderConfig):
    """Predicts the pixels of the hidden patches."""

    depth: int = Field(8, ge=1)


class FeatureDecoderConfig(DecoderConfig):
    """Completes the online features before they are pooled; depth 0 pools the visible tokens instead."""

    depth: int = Field(2, ge=0, le=8)  # Source: paper table 4c; 8 collapsed to a trivial solution
    shared: bool = False  # use the pixel decoder's first `depth` blocks. Source: paper table 4c


class ConvConfig(Section):
    """The two convolutional stages before the transformer of a hybrid encoder. Source: ConvMAE-Base."""

    dims: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (256, 384)
    depths: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (2, 2)
    mlp_ratio: float = Field(4.0, gt=0)


class ModelConfig(Section):
    """The encoder of both branches (a named size or three numbers) and the two decoders."""

    encoder: EncoderName | None = None
    embed_dim: int | None = Field(None, ge=4, multiple_of=4)
    depth: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    conv: ConvConfig | None = None  # with three numbers: convolutional stages first, as in convvit_*
    mlp_ratio: float = Field(4.0, gt=0)
    patch_size: int = Field(16, ge=1)  # px. Source: ViT-S/B/L; ViT-H uses 14
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    feature_decoder: FeatureDecoderConfig = FeatureDecoderConfig()
    init: str | None = None  # start from these weights: a run, file or folder that cmae_scale.convert reads
    attention: Attention = "auto"  # explicit products or a fused kernel; auto: as a short trial of each part
    # says; a named one that cannot run is an error
    remat: Remat = (
        "none"  # recompute in backward: selective keeps the matrix products, full only block inputs
    )

    @model_validator(mode="after")
    def _one_way_to_size(self) -> "ModelConfig":
        explicit = (self.embed_dim, self.depth, self.num_heads)
        if self.encoder is None and None in explicit:
            raise ValueError(
                'write "encoder": "vit_base" (or another size), or all of embed_dim, depth, num_heads'
            )
        if self.encoder is not None and (*explicit, self.conv) != (None, None, None, None):
            raise ValueError(
                "encoder names a size already: drop embed_dim, depth, num_heads and conv, "
                "or set encoder to null"
            )
        if self.is_hybrid and self.patch_size % 4:
            raise ValueError(
                f"a hybrid encoder merges 4 x 4 sites into a patch: patch_size {self.patch_size} must be "
                "a multiple of 4"
            )
        if self.embed_dim is not None and self.num_heads is not None and self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.feature_decoder.shared and self.feature_decoder.depth > self.pixel_decoder.depth:
            raise ValueError("feature_decoder.shared needs feature_decoder.depth <= pixel_decoder.depth")
        if self.feature_decoder.shared and self.feature_decoder.embed_dim != self.pixel_decoder.embed_dim:
            raise ValueError("feature_decoder.shared needs the same embed_dim in both decoders")
        return self

    @property
    def is_hybrid(self) -> bool:
        """Whether convolutional stages come before the transformer (else it is a plain one)."""
        return self.conv is not None or (self.encoder is not None and self.encoder.startswith("convvit"))


class HeadsConfig(Section):
    """Projector (both branches) and predictor (online): Linear, norm, ReLU, Linear."""

    hidden_dim: int = Field(1536, ge=1)  # Source: official config
    out_dim: int = Field(256, ge=1)  # Source: official config
    norm: Literal["sync_batch", "layer"] = "sync_batch"  # layer: no statistics over the batch, so exactly
    # the same however the batch is spread over ranks and accumulation


class MaskConfig(Section):
    """Which patches of the online view the encoder may not see."""

    ratio: float = Field(0.65, gt=0, lt=1)  # fraction hidden. Source: official config; MAE 0.75
    cell: int = Field(2, ge=1)  # hide in cell x cell groups of patches. Source: official cmae_vit.py; 1 = MAE


class ColorConfig(Section):
    """Colour augmentation of the target view. Source: official datasets/cmae_dataset.py."""

    jitter_p: Fraction = 0.8
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: float = Field(0.1, ge=0, le=0.5)
    gray_p: Fraction = 0.2
    blur_p: Fraction = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # px of the view, uniform

    @model_validator(mode="after")
    def _sigma_range(self) -> "ColorConfig":
        low, high = self.blur_sigma
        if not 0 < low <= high:
            raise ValueError(f"blur_sigma must be two numbers 0 < low <= high, not {list(self.blur_sigma)}")
        return self


class ViewsConfig(Section):
    """From one decoded image to the online and the target view. Source: paper 3.2; official pipelines."""

    img_px: int = Field(224, ge=1)  # side of both views
    master_px: int = Field(256, ge=1)  # side of the random resized crop that both views are cut from
    shift_px: int = Field(32, ge=0)  # the target crop starts at 0..shift_px-1. Source: paper 4.4 "[0,31]"
    target_crop: Literal["shift", "random"] = "shift"  # random: an independent crop. Source: paper table 4b
    color: bool = True
    color_ops: ColorConfig = ColorConfig()
    flip_p: Fraction = 0.5  # of the master image, so shared by both views
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the area. Source: official config
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]. Source: ImageNet
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _fits(self) -> "ViewsConfig":
        if self.master_px < self.img_px:
            raise ValueError(f"master_px {self.master_px} is smaller than img_px {self.img_px}")
        if self.target_crop == "shift" and self.shift_px - 1 > self.master_px - self.img_px:
            raise ValueError(
                f"shift_px {self.shift_px} leaves the master image: write at most "
                f"{self.master_px - self.img_px + 1}, or master_px {self.img_px + self.shift_px}"
            )
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two numbers 0 < low <= high, not {[low, high]}")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale {list(self.crop_scale)} is a share of the area: at most 1")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {list(self.std)}")
        return self


class LossConfig(Section):
    """Total = pixel + weight * scale * contrast."""

    contrast: Literal["infonce", "byol"] = "infonce"
    weight: float = Field(1.0, ge=0)  # 0 = plain MAE: no target branch, feature decoder or heads are built
    temperature: float = Field(0.07, gt=0)  # Source: paper 4.1
    scale: Literal["official", "paper"] = (
        "official"  # of InfoNCE: 2 * temperature in the official head, else 1
    )
    norm_pix: bool = True  # predict each patch normalised by its own mean and variance. Source: MAE table 1d


class TargetConfig(Section):
    """The momentum branch."""

    momentum: float = Field(0.996, ge=0, le=1)  # Source: paper 3.3, official config
    momentum_schedule: Literal["constant", "cosine"] = "constant"  # cosine rises to 1 at the end
    mask_ratio: float = Field(0.0, ge=0, lt=1)  # Source: paper table 4e
    final_norm: bool = False  # Source: official algorithms/cmae.py
    pool: Literal["mean", "cls"] = "mean"  # Source: paper equation 2


class DataConfig(Section):
    """Where the images are and how they are streamed."""

    shards: str | tuple[str, ...] = Field(
        min_length=1
    )  # folder(s) with index.json, made by data_prep/make_shards.py, or some of a folder's tars: paths or
    # http(s)://, s3://, gs://, hf:// addresses, with *, ? and {000..099};
    # ${NAME} is the environment's, for a secret that the run file should not hold
    mix: tuple[PositiveFloat, ...] | None = (
        None  # share of every batch for each entry of shards; null = all samples equally often
    )
    val_shards: str | None = None  # held-out images for the pictures; null = some of `shards`
    workers: int = Field(4, ge=1)  # decoding threads per rank. Does not change results
    streams: int | None = Field(
        None, ge=1
    )  # parallel cursors over an epoch; null = largest divisor of the batch <= 64. With fewer than ranks,
    # several ranks read the same shards
    shuffle_window: int = Field(
        256, ge=1
    )  # samples of a stream shuffled together, in memory as compressed bytes
    max_bad_fraction: Fraction = 0.001  # unreadable samples beyond this share stop the run
    max_image_mpx: float = Field(50.0, gt=0)  # larger images count as bad before they are decoded
    prefetch: int = Field(2, ge=1)  # batches decoded ahead of the model; under accumulation so many beyond
    # all but one of the next step's, which it takes at once. Does not change results
    cache: str | None = None  # folder on a local disk that keeps what was read from remote shards
    cache_gib: float = Field(100.0, gt=0)  # its size; the least recently used goes first
    read_timeout_s: float = Field(
        60.0, gt=0
    )  # a request of remote data that takes longer is made again, a command that takes longer is damage
    read_retries: int = Field(8, ge=0)  # repetitions of a failed request: about half a minute of pauses
    allow_commands: bool = False  # shards may be "pipe:COMMAND {name}", which runs that command

    @model_validator(mode="after")
    def _mix_fits(self) -> "DataConfig":
        sets = 1 if isinstance(self.shards, str) else len(self.shards)
        if self.mix is not None and len(self.mix) != sets:
            raise ValueError(f"mix needs one number for each entry of shards: {sets}, not {len(self.mix)}")
        return self


class ScheduleConfig(Section):
    """Linear warm-up, then cosine, per optimizer step."""

    base_lr: float = Field(1.5e-4, gt=0)  # at batch 256: "lr": "auto" is base_lr * train_batch_size / 256
    duration: Duration = "300ep"
    warmup: Duration = "40ep"  # Source: official config
    warmup_start: Fraction = 1e-4  # share of the peak at step 0. Source: official config
    min_lr: float = Field(0.0, ge=0)


class CheckpointConfig(Section):
    """Training state, to go on after any interruption."""

    every: Duration = "5%"
    keep: int = Field(2, ge=1)  # newest states kept
    keep_every: Duration | None = None  # states at multiples of this are kept too; null = none
    # whether to go on from the newest state in the run folder. auto: if there is one; required: there must
    # be one; anyway: as auto, and settings of the method may differ, which are listed; never: start anew
    resume: Literal["auto", "required", "anyway", "never"] = "auto"


class KnnConfig(Section):
    """Weighted nearest neighbours of frozen features: what an encoder knows without any training.

    Source: Wu et al. (arXiv:1805.01978) section 3.4; DINO eval_knn.py.
    """

    k: int = Field(20, ge=1)  # Source: DINO, best of 10, 20, 100, 200
    temperature: float = Field(0.07, gt=0)  # a neighbour's vote is exp(cosine / temperature)
    pool: Pool = "mean"


class KnnMonitorConfig(KnnConfig):
    """Nearest neighbours while pre-training goes on."""

    every: Duration = "10%"
    shards: str | tuple[str, ...] | None = None  # labelled, to vote; null = data.shards
    val_shards: str | tuple[str, ...] | None = None  # labelled, to be classified; null = data.val_shards
    train_fraction: float = Field(1.0, gt=0, le=1)  # only the first part of every voting shard
    batch: int = Field(256, ge=1)  # images of a forward pass on a rank. Does not change results


class MonitorConfig(Section):
    """What is written while training."""

    log_every: int = Field(20, ge=1)  # optimizer steps per line of metrics.jsonl
    health: bool = True  # gradient norms by part, target distance, spread of queries and keys in each line;
    # measured in the last step before it
    breakdown: bool = False  # milliseconds per step of data, augment, forward, target, backward, ... by line
    profile: Annotated[str, Field(pattern=r"^[1-9]\d*(-[1-9]\d*)?$")] | None = (
        None  # steps "10-12", counted as in metrics.jsonl: torch profiler trace in RUN/profile, of rank 0
    )
    pictures: int = Field(8, ge=0)  # held-out images in the reconstruction sheet; 0 = none
    knn: KnnMonitorConfig | None = None  # null = no nearest neighbours

    @model_validator(mode="after")
    def _profile_in_order(self) -> "MonitorConfig":
        first, _, last = (self.profile or "").partition("-")
        if last and int(last) < int(first):
            raise ValueError(f'profile "{self.profile}" ends before it begins: write "{last}-{first}"')
        return self


class FaultsConfig(Section):
    """What the run does when something goes wrong that it can survive."""

    bad_step: Literal["skip", "stop", "rewind"] = "skip"  # a loss or gradient that is not finite, or a spike:
    # leave the step out (one batch in a million is no loss), stop, or take up the newest state first (where
    # memory is in doubt). Nothing of such a step reaches weights, target or moments under any of them
    max_bad_steps: int = Field(3, ge=1)  # that many in a row are left out, the next stops the run: then it is
    # not the batch. Source: DINOv3 stops after more than 2
    spike: float | None = Field(None, gt=0)  # also bad: a loss that many standard deviations above the mean
    # of about the last 100 steps; null = none, because a loss may rise without harm (a new learning rate)
    step_timeout_s: float = Field(600.0, gt=0)  # no progress for so long ends the run with everyone's stacks;
    # three times as long at the first step and while saving. As long as torch's collectives wait
    peer_timeout_s: float = Field(
        30.0, gt=0
    )  # a rank that shows no life for so long ends the run (named after
    # a third of it); a rank that died is noticed at once


class NetworkConfig(Section):
    """What decides which tensors a model has, and their shapes: all that a file of weights needs."""

    model: ModelConfig
    views: ViewsConfig = ViewsConfig()
    heads: HeadsConfig = HeadsConfig()
    loss: LossConfig = LossConfig()
    target: TargetConfig = TargetConfig()

    @model_validator(mode="after")
    def _patches_fit(self) -> "NetworkConfig":
        img, patch = self.views.img_px, self.model.patch_size
        if img % patch:
            raise ValueError(
                f"views.img_px {img} is not a multiple of model.patch_size {patch}: write img_px "
                f"{max(1, img // patch) * patch} or a patch_size that divides {img}"
            )
        if self.target.pool == "cls" and self.model.is_hybrid:
            raise ValueError('a hybrid encoder has no class token: write target.pool "mean"')
        return self

    @property
    def has_contrast(self) -> bool:
        """Whether there is a target branch at all (else it is a plain MAE)."""
        return self.loss.weight > 0

    @property
    def grid(self) -> int:
        """Patches along a side of a view."""
        return self.views.img_px // self.model.patch_size


class CmaeConfig(NetworkConfig):
    """Everything about the run that is not DeepSpeed's."""

    data: DataConfig
    mask: MaskConfig = MaskConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    faults: FaultsConfig = FaultsConfig()
    decay_tokens: bool = False  # weight decay for class and mask tokens too, as MAE (timm's add_weight_decay,
    # which spares one-dimensional parameters only). Source: false as in the official config
    compile: Literal["none", "blocks"] = "none"  # torch.compile for every transformer block; ZeRO 0 to 2
    out: str | None = None  # run folder; null = runs/<name of the run file>
    seed: int = Field(60, ge=0)  # Source: official config

    @model_validator(mode="after")
    def _mask_fits(self) -> "CmaeConfig":
        grid, cell = self.grid, self.mask.cell
        if grid % cell:
            best = max(side for side in range(1, cell) if grid % side == 0)
            raise ValueError(
                f"mask.cell {cell} does not divide the {grid} x {grid} patch grid "
                f"(views.img_px / model.patch_size): write mask.cell {best}"
            )
        cells = (grid // cell) ** 2
        kept = int(cells * (1 - self.mask.ratio))
        if not 0 < kept < cells:
            raise ValueError(
                f"mask.ratio {self.mask.ratio} of {cells} cells keeps {kept}: "
                "at least one cell must be kept and one hidden"
            )
        if self.target.mask_ratio and int(cells * (1 - self.target.mask_ratio)) < 1:
            raise ValueError(f"target.mask_ratio {self.target.mask_ratio} of {cells} cells keeps none")
        return self
