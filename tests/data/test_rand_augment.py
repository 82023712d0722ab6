"""RandAugment with given numbers equals timm's with the same luck."""

import numpy as np
import pytest
from PIL import Image

from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.data.decoding import SampleSlot
from cmae_scale.data.rand_augment import TrainingCrops, apply_operation, build_rand_augment, draw_magnitude

OFFICIAL = "rand-m9-mstd0.5-inc1"
MEAN = (0.485, 0.456, 0.406)


def picture(side: int = 48) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("is_negative", [False, True])
@pytest.mark.parametrize(
    "operation", build_rand_augment(OFFICIAL, img_px=48, mean=MEAN).operations, ids=lambda op: op.name
)
def test_every_operation_is_timms(operation, is_negative: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    strength = 0.3
    ours = apply_operation(operation, picture(), strength=strength, is_negative=is_negative)
    magnitude = draw_magnitude(operation, strength)
    monkeypatch.setattr("random.gauss", lambda *_: magnitude)
    chances = iter([0.0, 0.9 if is_negative else 0.1])  # whether at all, which way
    monkeypatch.setattr("random.random", lambda: next(chances))
    assert (np.asarray(ours) == np.asarray(operation(picture()))).all()


def test_the_strongest_posterisation_is_black() -> None:
    augmentation = build_rand_augment(OFFICIAL, img_px=48, mean=MEAN)
    [posterize] = [one for one in augmentation.operations if one.name == "PosterizeIncreasing"]
    black = apply_operation(posterize, picture(), strength=0.9999, is_negative=False)
    assert not np.asarray(black).any()


def test_magnitudes_are_normal_about_nine() -> None:
    operation = build_rand_augment(OFFICIAL, img_px=48, mean=MEAN).operations[0]
    strengths = (np.arange(1000) + 0.5) / 1000
    drawn = np.array([draw_magnitude(operation, float(strength)) for strength in strengths])
    assert drawn.mean() == pytest.approx(9, abs=0.05)
    assert drawn.std() == pytest.approx(0.5, abs=0.03)
    assert drawn.max() <= 10


def test_all_operations_come_up_equally_often_and_half_of_them_act() -> None:
    augmentation = build_rand_augment(OFFICIAL, img_px=48, mean=MEAN)
    assert augmentation.layers == 2
    assert len(augmentation.operations) == 15
    assert {operation.prob for operation in augmentation.operations} == {0.5}
    nothing = [0.0, 0.5, 0.5, 0.5] * 2
    assert augmentation.apply(picture(), nothing) == picture()


def decode(crops: TrainingCrops, data: bytes, slot: SampleSlot) -> np.ndarray:
    out = np.empty((1, crops.side, crops.side, 3), np.uint8)
    crops.decode(data, slot, out=out)
    return out


def test_a_crop_depends_on_its_sample_and_epoch_alone() -> None:
    import io

    file = io.BytesIO()
    picture(64).save(file, "PNG")
    crops = TrainingCrops(CropConfig(img_px=32), 50.0, build_rand_augment(OFFICIAL, img_px=32, mean=MEAN))
    first, again, other = (
        decode(crops, file.getvalue(), slot)
        for slot in (SampleSlot(0, 3, 7), SampleSlot(0, 3, 7), SampleSlot(0, 4, 7))
    )
    assert first.shape == (1, 32, 32, 3)
    assert (first == again).all()
    assert (first != other).any()


def test_a_plain_crop_is_torchvisions_resize_of_its_box_mirrored_half_the_time() -> None:
    import io

    file = io.BytesIO()
    picture(32).save(file, "PNG")
    whole = CropConfig(img_px=32, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    crops = TrainingCrops(whole, 50.0)
    pixels = np.asarray(picture(32))
    seen = [decode(crops, file.getvalue(), SampleSlot(0, 0, number))[0] for number in range(200)]
    mirrored = sum(bool((one == pixels[:, ::-1]).all()) for one in seen)
    straight = sum(bool((one == pixels).all()) for one in seen)
    assert mirrored + straight == 200
    assert 70 < mirrored < 130
    assert seen[0].dtype == np.uint8


def test_what_timm_does_not_take_is_told() -> None:
    with pytest.raises(ConfigError, match="weighted operations are not supported"):
        build_rand_augment("rand-m9-tweights", img_px=32, mean=MEAN)
