"""Whole views against a slow reference that treats one image at a time with torchvision."""

from typing import Any

import pytest
import torch
import torchvision.transforms.functional as tv
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmae_scale.augment.views as views_module
from cmae_scale.augment import ViewNumbers, denormalise, draw_views, make_views
from cmae_scale.augment.views import cut_windows, place_windows, send
from cmae_scale.config.cmae import ColorConfig, ViewsConfig

TOLERANCE = 2e-5  # roundings of at most 5e-6 in [0, 1] (see test_color), divided by a std of at least 0.22
SMALL = ViewsConfig(img_px=28, master_px=32, shift_px=5)


def draw(total: int, *, views: ViewsConfig, seed: int = 0) -> ViewNumbers:
    return draw_views(total, views=views, rng=torch.Generator().manual_seed(seed))


def masters(total: int, *, views: ViewsConfig, seed: int = 1) -> Tensor:
    crops = 2 if views.target_crop == "random" else 1
    shape = (total, crops, 3, views.master_px, views.master_px)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def view_slowly(image: Tensor, numbers: ViewNumbers, *, views: ViewsConfig) -> tuple[Tensor, Tensor]:
    """Online and target view of one image, in the order of the official pipeline."""
    if numbers.flip[0]:
        image = tv.hflip(image)
    side = views.img_px
    online = tv.crop(image[0], 0, 0, side, side) / 255
    target = tv.crop(image[-1], int(numbers.shift_y[0]), int(numbers.shift_x[0]), side, side) / 255
    if numbers.jitter[0]:
        for operation in numbers.order[0].tolist():
            match operation:
                case 0:
                    target = tv.adjust_brightness(target, float(numbers.brightness[0]))
                case 1:
                    target = tv.adjust_contrast(target, float(numbers.contrast[0]))
                case 2:
                    target = tv.adjust_saturation(target, float(numbers.saturation[0]))
                case 3:
                    target = tv.adjust_hue(target, float(numbers.hue[0]))
    if numbers.gray[0]:
        target = tv.rgb_to_grayscale(target, 3)
    if numbers.blur[0]:
        radius = min(6, side - 1)  # three times the default's largest sigma
        target = tv.gaussian_blur(target, [2 * radius + 1] * 2, [float(numbers.sigma[0])] * 2)
    return tv.normalize(online, views.mean, views.std), tv.normalize(target, views.mean, views.std)


@pytest.mark.parametrize(
    "views",
    [
        SMALL,
        ViewsConfig(img_px=28, master_px=28, shift_px=0),
        ViewsConfig(img_px=28, master_px=32, shift_px=0, target_crop="random"),
        ViewsConfig(img_px=28, master_px=60, shift_px=33),
        ViewsConfig(img_px=4, master_px=6, shift_px=3),
        ViewsConfig(img_px=28, master_px=32, shift_px=5, color=False),
        ViewsConfig(
            img_px=28, master_px=32, shift_px=5, color_ops=ColorConfig(hue=0.5, jitter_p=1, brightness=1)
        ),
        ViewsConfig(img_px=28, master_px=32, shift_px=5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0)),
    ],
    ids=["default", "no_shift", "random", "wide", "tiny", "colour_off", "strong_colour", "other_statistics"],
)
def test_views_equal_the_reference_that_does_one_image_at_a_time(views: ViewsConfig) -> None:
    images, numbers = masters(48, views=views), draw(48, views=views)
    got = make_views(images, numbers, views=views)
    wanted = [view_slowly(images[i], numbers.rows(i, 1), views=views) for i in range(len(images))]
    online, target = (torch.stack(view) for view in zip(*wanted, strict=True))
    torch.testing.assert_close(got.online, online, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(got.target, target, atol=TOLERANCE, rtol=0)


def test_full_size_views_equal_the_reference() -> None:
    views = ViewsConfig()
    images, numbers = masters(4, views=views), draw(4, views=views, seed=2)
    got = make_views(images, numbers, views=views)
    for i in range(4):
        online, target = view_slowly(images[i], numbers.rows(i, 1), views=views)
        torch.testing.assert_close(got.online[i], online, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(got.target[i], target, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("total", [1, 2, 13])
def test_views_have_the_promised_shape_and_type(total: int) -> None:
    got = make_views(masters(total, views=SMALL), draw(total, views=SMALL), views=SMALL)
    for view in (got.online, got.target):
        assert view.shape == (total, 3, 28, 28)
        assert view.dtype == torch.float32
        assert view.is_contiguous()
        assert not view.requires_grad


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_views_of_all_ranks_are_the_views_of_one_process(ranks: int) -> None:
    images, numbers = masters(24, views=SMALL), draw(24, views=SMALL)
    whole, local = make_views(images, numbers, views=SMALL), 24 // ranks
    for rank in range(ranks):
        rows = slice(rank * local, (rank + 1) * local)
        part = make_views(images[rows], numbers.rows(rank * local, local), views=SMALL)
        assert torch.equal(part.online, whole.online[rows])
        assert torch.equal(part.target, whole.target[rows])


@pytest.mark.parametrize("group_bytes", [1, 30_000, 2**30])
def test_how_many_images_are_worked_on_together_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    images, numbers = masters(16, views=SMALL), draw(16, views=SMALL)
    usual = make_views(images, numbers, views=SMALL)
    monkeypatch.setattr(views_module, "_GROUP_BYTES_CPU", group_bytes)
    other = make_views(images, numbers, views=SMALL)
    assert torch.equal(other.online, usual.online)
    assert torch.equal(other.target, usual.target)


def test_masters_are_left_as_they_were() -> None:
    images, numbers = masters(8, views=SMALL), draw(8, views=SMALL)
    before = images.clone()
    make_views(images, numbers, views=SMALL)
    assert torch.equal(images, before)


@pytest.mark.parametrize("target_crop", ["shift", "random"])
def test_the_device_is_never_asked_for_a_value(target_crop: str) -> None:
    """A tensor on the meta device has no values: reading one, which on a GPU would wait for it, raises."""
    views = SMALL.model_copy(update={"target_crop": target_crop})
    images, numbers = masters(64, views=views).to("meta"), draw(64, views=views)
    assert all(event.any() for event in (numbers.flip, numbers.jitter, numbers.gray, numbers.blur))
    got = make_views(images, numbers, views=views)
    assert got.online.device == got.target.device == torch.device("meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        got.online.sum().item()  # the guard itself works


class Journeys(TorchDispatchMode):
    """Counts operations that bring tensors from the CPU elsewhere, and page-locked allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.pinned = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [one for one in tree_leaves(tree) if isinstance(one, Tensor)] for tree in (args, result)
        )
        self.count += any(one.is_cpu for one in given) and any(not one.is_cpu for one in (*given, *made))
        self.pinned += bool((kwargs or {}).get("pin_memory"))
        return result


@pytest.mark.parametrize("target_crop", ["shift", "random"])
@pytest.mark.parametrize(("online", "target"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("group_bytes", [30_000, 2**28], ids=["many_groups", "one_group"])
def test_all_numbers_travel_to_a_device_in_one_copy(
    monkeypatch: pytest.MonkeyPatch, target_crop: str, online: bool, target: bool, group_bytes: int
) -> None:
    """On the meta device, to which the way is the same."""
    monkeypatch.setattr(views_module, "_GROUP_BYTES", group_bytes)
    views = SMALL.model_copy(update={"target_crop": target_crop})
    images, numbers = masters(64, views=views).to("meta"), draw(64, views=views)
    noise = (torch.rand(64, 9), torch.rand(64, 9))
    with Journeys() as journeys:
        got = make_views(images, numbers, views=views, online=online, target=target, beside=noise)
    assert journeys.count == 1
    assert [view is not None for view in got[:2]] == [online, target]
    assert [one.device.type for one in got.beside] == ["meta", "meta"]


def test_nothing_is_copied_where_the_images_lie_on_the_cpu() -> None:
    noise = torch.rand(6, 9)
    got = make_views(masters(6, views=SMALL), draw(6, views=SMALL), views=SMALL, beside=(noise,))
    assert got.beside[0] is noise


PARCEL = [
    torch.tensor([True, False, True]),
    (torch.rand(3, 1, 2), None, torch.arange(5)),
    [torch.rand(2, 2).T, torch.empty(0, 4), 7, torch.rand(1, dtype=torch.float64), torch.tensor(3)],
]


def test_to_a_gpu_a_parcel_goes_from_page_locked_memory() -> None:
    """To one that is played: no GPU is needed."""
    with FakeTensorMode(allow_non_fake_inputs=True), Journeys() as journeys:
        sent = send(PARCEL, torch.device("cuda"))
    assert (journeys.count, journeys.pinned) == (1, 1)
    for before, after in zip(tree_leaves(PARCEL), tree_leaves(sent), strict=True):
        if isinstance(before, Tensor):
            assert (after.device.type, after.dtype, after.shape) == ("cuda", before.dtype, before.shape)
        else:
            assert after == before


def test_what_is_sent_arrives_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a device without memory, whose part a copy on the CPU plays."""
    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda self, device, **how: to(self, "cpu", copy=True))
    sent = send(PARCEL, torch.device("meta"))
    for before, after in zip(tree_leaves(PARCEL), tree_leaves(sent), strict=True):
        assert before is None or isinstance(before, int) or torch.equal(before, after)
        assert before is None or isinstance(before, int) or before.dtype == after.dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_that_is_behind_every_parcel_arrives_whole() -> None:
    device = torch.device("cuda")
    work, arrived = torch.randn(4096, 4096, device=device), []
    for number in range(200):
        work = work @ work / 64  # keeps the device behind the copies
        arrived.append(send((torch.full((1000,), number), torch.full((7,), number / 2)), device))
    for number, (whole, half) in enumerate(arrived):
        assert bool((whole == number).all())
        assert bool((half == number / 2).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_of_a_gpu_are_those_of_the_cpu() -> None:
    images, numbers = masters(48, views=SMALL), draw(48, views=SMALL)
    here, there = (make_views(one, numbers, views=SMALL) for one in (images, images.cuda()))
    torch.testing.assert_close(there.online.cpu(), here.online, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(there.target.cpu(), here.target, atol=TOLERANCE, rtol=0)


def test_views_do_not_change_under_autocast() -> None:
    images, numbers = masters(8, views=SMALL), draw(8, views=SMALL)
    usual = make_views(images, numbers, views=SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = make_views(images, numbers, views=SMALL)
    assert torch.equal(under.target, usual.target)
    assert torch.equal(under.online, usual.online)


@pytest.mark.parametrize("shape", [(4, 2, 3, 32, 32), (4, 1, 3, 33, 33), (3, 1, 3, 32, 32)])
def test_masters_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="master images are"):
        make_views(torch.zeros(shape, dtype=torch.uint8), draw(4, views=SMALL), views=SMALL)


def test_denormalise_brings_the_pixels_back() -> None:
    images, numbers = masters(6, views=SMALL), draw(6, views=SMALL)
    pixels = denormalise(make_views(images, numbers, views=SMALL).online, views=SMALL)
    wanted = (
        torch.where(numbers.flip[:, None, None, None], images[:, 0].flip(-1), images[:, 0])[..., :28, :28]
        / 255
    )
    torch.testing.assert_close(pixels, wanted, atol=1e-6, rtol=0)


def test_denormalise_clips_what_no_picture_can_show() -> None:
    extreme = torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    assert denormalise(extreme, views=SMALL).aminmax() == (0, 1)


def cut_slowly(image: Tensor, *, top: int, left: int, flip: bool, side: int) -> Tensor:
    master = image.flip(-1) if flip else image
    return master[:, top : top + side, left : left + side]


@pytest.mark.parametrize(("master", "side"), [(9, 6), (32, 28), (8, 8), (5, 1)])
@pytest.mark.parametrize("crop", [0, 1])
def test_windows_equal_slices_of_flipped_images(
    rng: torch.Generator, master: int, side: int, crop: int
) -> None:
    images = torch.randint(0, 256, (5, 2, 3, master, master), generator=rng, dtype=torch.uint8)
    rows = torch.tensor([4, 0, 1, 1, 3, 2])
    top, left = torch.randint(0, master - side + 1, (2, len(rows)), generator=rng)
    flip = torch.tensor([True, False, True, False, True, True])
    windows = place_windows(rows, shape=images.shape, crop=crop, top=top, left=left, flip=flip, side=side)
    got = cut_windows(images, windows, side=side)
    wanted = [
        cut_slowly(images[row, crop], top=int(y), left=int(x), flip=bool(mirror), side=side)
        for row, y, x, mirror in zip(rows, top, left, flip, strict=True)
    ]
    assert torch.equal(got, torch.stack(wanted))


def test_images_that_are_a_part_of_a_larger_tensor_work(rng: torch.Generator) -> None:
    images = torch.randint(0, 256, (6, 2, 3, 8, 8), generator=rng, dtype=torch.uint8)[1::2, :1]
    zero = torch.zeros(3, dtype=torch.long)
    where = {"crop": 0, "top": zero, "left": zero + 2, "flip": zero > 0, "side": 5}
    got = cut_windows(images, place_windows(torch.arange(3), shape=images.shape, **where), side=5)
    assert torch.equal(got, images[:, 0, :, :5, 2:7])
