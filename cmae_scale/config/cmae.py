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

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DecoderConfig(Section):
    """A light transformer over all patches, fed with the encoder's visible tokens and mask tokens."""

    depth: int = Field(8, ge=0)
    """Transformer blocks. Source: MAE (arXiv:2111.06377) table 1a; official config."""
    embed_dim: int = Field(512, ge=4, multiple_of=4)
    """Width of its tokens, a multiple of 4 (rows and columns x sine and cosine). Source: MAE table 1b."""
    num_heads: int = Field(16, ge=1)
    """Attention heads, a divisor of embed_dim. Source: facebookresearch/mae models_mae.py."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Width of a block's MLP / width of its tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "DecoderConfig":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        return self


class PixelDecoderConfig(DecoderConfig):
    """Predicts the pixels of the hidden patches."""

    depth: int = Field(8, ge=1)
    """Transformer blocks. Source: MAE (arXiv:2111.06377) table 1a; official config."""


class FeatureDecoderConfig(DecoderConfig):
    """Completes the online features before they are pooled; depth 0 pools the visible tokens instead."""

    depth: int = Field(2, ge=0, le=8)
    """Transformer blocks; 0 pools the visible tokens. Source: paper table 4c; 8 collapsed to a trivial
    solution.
    """
    shared: bool = False
    """Use the pixel decoder's first `depth` blocks instead of blocks of its own. Source: paper table 4c."""


class ConvConfig(Section):
    """The two convolutional stages before the transformer of a hybrid encoder. Source: ConvMAE-Base."""

    dims: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (256, 384)
    """Channels of the two convolutional stages."""
    depths: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (2, 2)
    """Blocks of the two convolutional stages."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Width of a convolutional block's MLP / channels of its stage."""


class ModelConfig(Section):
    """The encoder of both branches (a named size or three numbers) and the two decoders."""

    encoder: EncoderName | None = None
    """A named size; null = the one that embed_dim, depth and num_heads spell out."""
    embed_dim: int | None = Field(None, ge=4, multiple_of=4)
    """Width of the encoder's tokens, a multiple of 4; only without `encoder`."""
    depth: int | None = Field(None, ge=1)
    """Transformer blocks of the encoder; only without `encoder`."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads of the encoder, a divisor of embed_dim; only without `encoder`."""
    conv: ConvConfig | None = None
    """Convolutional stages before the transformer, as in convvit_*; only without `encoder`. null = none."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Width of an encoder block's MLP / width of its tokens."""
    patch_size: int = Field(16, ge=1)
    """Side of a patch, px. Source: ViT-S/B/L; ViT-H uses 14."""
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    """Predicts the pixels of the hidden patches."""
    feature_decoder: FeatureDecoderConfig = FeatureDecoderConfig()
    """Completes the online features for the contrast loss."""
    init: str | None = None
    """Weights to start from: a run, file or folder that cmae_scale.convert reads; null = random ones."""
    attention: Attention = "auto"
    """Explicit products, or a fused kernel by name; auto = what is fastest in a short trial of each part. A
    named one that cannot run is an error.
    """
    remat: Remat = "none"
    """What is computed again in the backward pass instead of kept: none; selective keeps the matrix
    products, full the blocks' inputs only.
    """
    skip_redundant: bool = False
    """Leave out operations that no loss reads or that are the same for all images (the last pixel block on
    visible tokens, the first decoder blocks' query, key and value of mask tokens, the target's last linear
    layer on each token instead of on their mean): the same results but for rounding.
    """

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

    hidden_dim: int = Field(1536, ge=1)
    """Width of the hidden layer. Source: official config."""
    out_dim: int = Field(256, ge=1)
    """Width of queries and keys. Source: official config."""
    norm: Literal["sync_batch", "layer"] = "sync_batch"
    """sync_batch: batch norm over all ranks; layer: no statistics over the batch, so the same however the
    batch is spread over ranks and accumulation.
    """


class MaskConfig(Section):
    """Which patches of the online view the encoder may not see."""

    ratio: float = Field(0.65, gt=0, lt=1)
    """Share of the patches that is hidden. Source: official config; MAE 0.75."""
    cell: int = Field(2, ge=1)
    """Patches are hidden in groups of cell x cell. Source: official cmae_vit.py; 1 = MAE."""


class ColorConfig(Section):
    """Colour augmentation of the target view. Source: official datasets/cmae_dataset.py."""

    jitter_p: Fraction = 0.8
    """Probability of changing brightness, contrast, saturation and hue at all."""
    brightness: Fraction = 0.4
    """Largest relative change of brightness."""
    contrast: Fraction = 0.4
    """Largest relative change of contrast."""
    saturation: Fraction = 0.4
    """Largest relative change of saturation."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Largest turn of the hue, as a share of the colour circle."""
    gray_p: Fraction = 0.2
    """Probability of a grey view."""
    blur_p: Fraction = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, px of the view; uniform in it."""

    @model_validator(mode="after")
    def _sigma_range(self) -> "ColorConfig":
        low, high = self.blur_sigma
        if not 0 < low <= high:
            raise ValueError(f"blur_sigma must be two numbers 0 < low <= high, not {list(self.blur_sigma)}")
        return self


class ViewsConfig(Section):
    """From one decoded image to the online and the target view. Source: paper 3.2; official pipelines."""

    img_px: int = Field(224, ge=1)
    """Side of both views, px; a multiple of model.patch_size."""
    master_px: int = Field(256, ge=1)
    """Side of the random resized crop that both views are cut from, px."""
    shift_px: int = Field(32, ge=0)
    """The target view is cut at an offset of 0 to shift_px - 1 px in that crop, in each direction. Source:
    paper 4.4 "[0,31]".
    """
    target_crop: Literal["shift", "random"] = "shift"
    """shift: both views from one crop; random: an independent crop for the target. Source: paper table 4b."""
    color: bool = True
    """Whether the target view's colours are changed at all."""
    color_ops: ColorConfig = ColorConfig()
    """How the target view's colours are changed."""
    flip_p: Fraction = 0.5
    """Probability of a horizontal flip, which both views share."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's area as a share of the image's. Source: official config."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of the crop's width / height."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of RGB in [0, 1], subtracted from images. Source: ImageNet."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of RGB in [0, 1], by which images are divided. Source: ImageNet."""

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
    """The contrast loss: InfoNCE with the keys of the whole batch, or BYOL's without negatives."""
    weight: float = Field(1.0, ge=0)
    """Weight of the contrast loss; 0 = a plain MAE, without target branch, feature decoder and heads."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of InfoNCE. Source: paper 4.1."""
    scale: Literal["official", "paper"] = "official"
    """Factor of InfoNCE besides its weight: 2 * temperature as in the official head, or 1 as in the paper."""
    norm_pix: bool = True
    """Predict each patch normalised by its own mean and variance. Source: MAE table 1d."""


class TargetConfig(Section):
    """The momentum branch."""

    momentum: float = Field(0.996, ge=0, le=1)
    """Share of the target that an update keeps. Source: paper 3.3, official config."""
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    """constant, or cosine: rising to 1 at the end of the run."""
    mask_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the target view's patches that is hidden. Source: paper table 4e."""
    final_norm: bool = False
    """Whether the target encoder ends with a layer norm. Source: official algorithms/cmae.py."""
    pool: Literal["mean", "cls"] = "mean"
    """How the target's tokens become one feature: mean of the patches', or the class token. Source: paper
    equation 2.
    """


class DataConfig(Section):
    """Where the images are and how they are streamed."""

    shards: str | tuple[str, ...] = Field(min_length=1)
    """Folders with an index.json, made by data_prep/make_shards.py, or some of a folder's tars: paths or
    http(s)://, s3://, gs://, hf:// addresses, with *, ? and {000..099}. ${NAME} is taken from the
    environment, for a secret that the run file should not hold.
    """
    mix: tuple[PositiveFloat, ...] | None = None
    """Share of every batch for each entry of shards; null = all samples equally often."""
    val_shards: str | None = None
    """Held-out images for the pictures; null = some of `shards`."""
    workers: int = Field(4, ge=1)
    """Decoding threads of a rank. Changes no result."""
    streams: int | None = Field(None, ge=1)
    """Parallel cursors over an epoch; null = the largest divisor of the batch up to 64. With fewer than
    ranks, several ranks read the same shards.
    """
    shuffle_window: int = Field(256, ge=1)
    """Samples of a stream that are shuffled together, held in memory as compressed bytes."""
    max_bad_fraction: Fraction = 0.001
    """Share of unreadable samples beyond which the run stops."""
    max_image_mpx: float = Field(50.0, gt=0)
    """Largest image in megapixels; larger ones count as unreadable and are never decoded."""
    prefetch: int = Field(2, ge=1)
    """Micro-batches decoded ahead of the model, beyond accumulation - 1: a step takes all of its own at once,
    so a whole step is always made ahead. 2 * accumulation - 1 + prefetch of them lie in main memory (`plan`
    says how much that is). Changes no result.
    """
    cache: str | None = None
    """Folder on a local disk that keeps what was read from remote shards; null = none."""
    cache_gib: float = Field(100.0, gt=0)
    """Size of that folder, GiB; what was used least recently goes first."""
    read_timeout_s: float = Field(60.0, gt=0)
    """Seconds after which a request of remote data is made again, and a command that is silent counts as
    failed.
    """
    read_retries: int = Field(8, ge=0)
    """Repetitions of a failed request: about half a minute of pauses in all."""
    allow_commands: bool = False
    """Whether shards may be "pipe:COMMAND {name}", which runs that command."""

    def count_ahead(self, accumulation: int) -> int:
        """Micro-batches of a rank that are ready or being decoded, beyond those that were taken.

        They hold a whole step, so that all the time of one is there to decode the next.
        """
        return accumulation - 1 + self.prefetch

    @model_validator(mode="after")
    def _mix_fits(self) -> "DataConfig":
        sets = 1 if isinstance(self.shards, str) else len(self.shards)
        if self.mix is not None and len(self.mix) != sets:
            raise ValueError(f"mix needs one number for each entry of shards: {sets}, not {len(self.mix)}")
        return self


class ScheduleConfig(Section):
    """Linear warm-up, then cosine, per optimizer step."""

    base_lr: float = Field(1.5e-4, gt=0)
    """Learning rate at batch 256: "lr": "auto" is base_lr * train_batch_size / 256. Source: official config.

    """
    duration: Duration = "300ep"
    """Length of the run: epochs, steps or samples, as "300ep", "5000st", "1.5Msamples"."""
    warmup: Duration = "40ep"
    """Length of the linear warm-up, or a share of the run ("2%"). Source: official config."""
    warmup_start: Fraction = 1e-4
    """Learning rate at step 0 as a share of its peak. Source: official config."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end."""


class CheckpointConfig(Section):
    """Training state, to go on after any interruption."""

    every: Duration = "5%"
    """Time between two checkpoints."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints that are kept."""
    keep_every: Duration | None = None
    """Checkpoints at multiples of this are kept too; null = none."""
    beside: bool = False
    """Whether a checkpoint is written while training goes on, from a copy in main memory (as large as this
    rank's share of it), and counts from the first step at which all ranks have written theirs. The last one,
    and one before leaving, is waited for. Changes no result.
    """
    resume: Literal["auto", "required", "anyway", "never"] = "auto"
    """Whether to go on from the newest checkpoint in the run folder. auto: if there is one; required: there
    must be one; anyway: as auto, and settings of the method may differ, which are listed; never: start anew.
    """


class KnnConfig(Section):
    """Weighted nearest neighbours of frozen features: what an encoder knows without any training.

    Source: Wu et al. (arXiv:1805.01978) section 3.4; DINO eval_knn.py.
    """

    k: int = Field(20, ge=1)
    """Neighbours that vote. Source: DINO, best of 10, 20, 100, 200."""
    temperature: float = Field(0.07, gt=0)
    """A neighbour's vote is exp(cosine / temperature)."""
    pool: Pool = "mean"
    """How an image's tokens become one feature: mean of the patches', or the class token."""


class KnnMonitorConfig(KnnConfig):
    """Nearest neighbours while pre-training goes on."""

    every: Duration = "10%"
    """Time between two evaluations; there is always one at the end."""
    shards: str | tuple[str, ...] | None = None
    """Labelled shards whose images vote; null = data.shards."""
    val_shards: str | tuple[str, ...] | None = None
    """Labelled shards whose images are classified; null = data.val_shards."""
    train_fraction: float = Field(1.0, gt=0, le=1)
    """Use only the first part of every voting shard."""
    batch: int = Field(256, ge=1)
    """Images of a forward pass on a rank. Changes no result."""


class MonitorConfig(Section):
    """What is written while training."""

    log_every: int = Field(20, ge=1)
    """Optimizer steps per line of metrics.jsonl."""
    health: bool = True
    """Gradient norms by part, target distance, and spread of queries and keys in each line, measured in the
    last step before it.
    """
    breakdown: bool = False
    """Milliseconds per step of data, augment, forward, target, backward and the rest in each line."""
    profile: Annotated[str, Field(pattern=r"^[1-9]\d*(-[1-9]\d*)?$")] | None = None
    """Steps such as "10-12", counted as in metrics.jsonl, of which rank 0 writes a torch profiler trace to
    RUN/profile; null = none.
    """
    pictures: int = Field(8, ge=0)
    """Held-out images in the sheet of reconstructions; 0 = none."""
    knn: KnnMonitorConfig | None = None
    """Nearest neighbours while pre-training goes on; null = none."""

    @model_validator(mode="after")
    def _profile_in_order(self) -> "MonitorConfig":
        first, _, last = (self.profile or "").partition("-")
        if last and int(last) < int(first):
            raise ValueError(f'profile "{self.profile}" ends before it begins: write "{last}-{first}"')
        return self


class FaultsConfig(Section):
    """What the run does when something goes wrong that it can survive."""

    bad_step: Literal["skip", "stop", "rewind"] = "skip"
    """What to do about a loss or gradient that is not finite, or a spike: skip leaves the step out (one
    batch in a million is no loss), stop ends the run, rewind goes back to the newest checkpoint first (where
    memory is in doubt). Nothing of such a step reaches weights, target or moments.
    """
    max_bad_steps: int = Field(3, ge=1)
    """So many bad steps in a row are left out; the next one stops the run, for then it is not the batch.
    Source: DINOv3 stops after more than 2.
    """
    spike: float | None = Field(None, gt=0)
    """A loss that many standard deviations above the mean of about the last 100 steps is bad too; null =
    none, because a loss may rise without harm (a new learning rate).
    """
    step_timeout_s: float = Field(600.0, gt=0)
    """Seconds without progress that end the run with the stacks of all ranks; three times as many at the
    first step and while saving. torch's collectives wait as long.
    """
    peer_timeout_s: float = Field(30.0, gt=0)
    """Seconds after which a silent rank ends the run (it is named after a third of them). A rank that died
    is noticed at once.
    """


class NetworkConfig(Section):
    """What decides which tensors a model has, and their shapes: all that a file of weights needs."""

    model: ModelConfig
    """The networks."""
    views: ViewsConfig = ViewsConfig()
    """From an image to the two views."""
    heads: HeadsConfig = HeadsConfig()
    """Projector and predictor."""
    loss: LossConfig = LossConfig()
    """The two losses."""
    target: TargetConfig = TargetConfig()
    """The momentum branch."""

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
    """The images."""
    mask: MaskConfig = MaskConfig()
    """The patches that are hidden."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Length and learning rate."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is saved, and how a run goes on."""
    monitor: MonitorConfig = MonitorConfig()
    """What is measured and written."""
    faults: FaultsConfig = FaultsConfig()
    """What happens when something goes wrong."""
    decay_tokens: bool = False
    """Weight decay for class and mask tokens too, as MAE (timm's add_weight_decay spares parameters of one
    dimension only). Source: false as in the official config.
    """
    compile: Literal["auto", "none", "blocks"] = "auto"
    """torch.compile for every transformer block in training; ZeRO 0 to 2, not with remat "selective". It
    rounds otherwise, as another kernel does. Auto: on a GPU, where torch can compile (it needs a C compiler).
    """
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """CUDA graphs of encoders and decoders, for hosts that launch kernels more slowly than the GPU runs them;
    ZeRO 0 to 2. Rounds as otherwise in a step's losses, and in gradients as another kernel would. Auto: on a
    GPU, where ZeRO allows it.
    """
    fused_views: Literal["auto", "on", "off"] = "auto"
    """Views by Triton kernels, which read and write each pixel once or twice; they round otherwise. Auto: on
    a GPU, where Triton can compile.
    """
    deterministic: bool = False
    """Only algorithms that give the same bits every time, on GPUs too (torch.use_deterministic_algorithms),
    and nothing compiled.
    """
    out: str | None = None
    """The run folder; null = runs/<name of the run file>."""
    seed: int = Field(60, ge=0)
    """Seed of weights, data order, views and masks. Source: official config."""

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
