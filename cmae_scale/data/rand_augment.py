"""Crops for fine-tuning, with timm's RandAugment by the sample's own random numbers.

timm draws from the process's global generators, which decoding threads share: what a sample gets would depend
on who comes first. Here operations and strengths are timm's own, and every draw is given.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from PIL import Image

from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.data.crops import resize
from cmae_scale.data.decode import CROP_DRAWS, GreyRange, decode_pixels, random_crop_box
from cmae_scale.data.decoding import Pixels, SampleSlot
from cmae_scale.data.plan import Purpose

_NUMBERS = 4  # of each operation: which one, whether at all, how strong, which way
# Strengths that timm gives a random sign, and the strength that changes nothing.
# Source: timm auto_augment.py, the level functions that call _randomly_negate
_TURNED_AROUND = {
    **dict.fromkeys(
        ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"), 0.0
    ),
    **dict.fromkeys(("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing"), 1.0),
    "SharpnessIncreasing": 1.0,
}


@dataclass(frozen=True)
class RandAugmentation:
    """A few operations of a list, one after the other. `operations` are timm's AugmentOp."""

    operations: tuple[Any, ...]
    layers: int

    @property
    def num_draws(self) -> int:
        """Numbers that `apply` needs."""
        return _NUMBERS * self.layers

    def apply(self, image: Image.Image, numbers: Sequence[float]) -> Image.Image:
        """The augmented image; `numbers` are `num_draws` uniform ones in [0, 1)."""
        for layer in range(self.layers):
            choice, chance, strength, sign = numbers[layer * _NUMBERS : (layer + 1) * _NUMBERS]
            operation = self.operations[int(choice * len(self.operations))]
            if chance < operation.prob:
                image = apply_operation(operation, image, strength=strength, is_negative=sign < 0.5)
        return image


def apply_operation(operation: Any, image: Image.Image, *, strength: float, is_negative: bool) -> Image.Image:
    """What timm's AugmentOp does, with its normal deviate at quantile `strength` and the sign given."""
    magnitude = draw_magnitude(operation, strength)
    level: Callable[..., tuple[float, ...]] | None = operation.level_fn
    arguments = () if level is None else level(magnitude, operation.hparams)
    if operation.name in _TURNED_AROUND:
        middle = _TURNED_AROUND[operation.name]
        distance = abs(arguments[0] - middle)
        arguments = (middle - distance if is_negative else middle + distance,)
    if operation.name.startswith("Posterize") and arguments[0] < 1:
        return Image.new(image.mode, image.size)  # no bit is kept: Pillow 12 raises, older ones gave black
    augmented: Image.Image = operation.aug_fn(image, *arguments, **operation.kwargs)
    return augmented


def draw_magnitude(operation: Any, strength: float) -> float:
    """timm's magnitude: fixed, uniform or normal about the setting, clipped."""
    magnitude = float(operation.magnitude)
    if operation.magnitude_std == math.inf:
        magnitude *= strength
    elif operation.magnitude_std > 0:
        inside = min(max(strength, 2.0**-53), 1 - 2.0**-53)
        magnitude = NormalDist(magnitude, operation.magnitude_std).inv_cdf(inside)
    return max(0.0, min(magnitude, float(operation.magnitude_max or 10)))


def build_rand_augment(spelling: str, *, img_px: int, mean: Sequence[float]) -> RandAugmentation:
    """The augmentation that timm's `spelling` ("rand-m9-mstd0.5-inc1") names; `mean` fills what gets empty.

    Raises ConfigError for a spelling that timm does not take.
    """
    from timm.data.auto_augment import rand_augment_transform

    fill = tuple(min(255, round(255 * value)) for value in mean)
    hparams = {
        "translate_const": int(img_px * 0.45),
        "img_mean": fill,
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        transform = rand_augment_transform(spelling, hparams)
    except Exception as error:  # timm's parser asserts, indexes and converts
        raise ConfigError(
            f'rand_augment "{spelling}" is not understood by timm ({error}): write "rand-m9-mstd0.5-inc1"'
        ) from None
    if transform.choice_weights is not None:
        raise ConfigError(f'rand_augment "{spelling}": weighted operations are not supported: drop "-t..."')
    return RandAugmentation(tuple(transform.ops), transform.num_layers)


@dataclass(frozen=True)
class TrainingCrops:
    """A random resized crop, mirrored with a chance, then RandAugment if given.

    Source: timm transforms_imagenet_train, the same order.
    """

    crop: CropConfig
    max_mpx: float
    augmentation: RandAugmentation | None = None
    crops: int = 1

    @property
    def side(self) -> int:
        """Side of a crop, px."""
        return self.crop.img_px

    def decode(
        self, data: bytes, slot: SampleSlot, *, out: Pixels, grey_range: GreyRange | None = None
    ) -> None:
        """One crop."""
        pixels = decode_pixels(data, max_mpx=self.max_mpx, grey_range=grey_range)
        height, width, _ = pixels.shape
        draws = slot.draw(Purpose.CROP, count=CROP_DRAWS)
        box = random_crop_box(width, height, scale=self.crop.scale, ratio=self.crop.ratio, draws=draws)
        picture = out[0]
        resize(pixels[box.top : box.bottom, box.left : box.right], out=picture)
        flip, *numbers = slot.draw(Purpose.AUGMENT, count=1 + self._count_numbers())
        if flip < self.crop.flip_p:
            picture[:] = picture[:, ::-1].copy()
        if self.augmentation is not None:
            picture[:] = self.augmentation.apply(Image.fromarray(picture), numbers)

    def _count_numbers(self) -> int:
        return 0 if self.augmentation is None else self.augmentation.num_draws
