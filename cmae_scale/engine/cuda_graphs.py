"""CUDA graphs: encoders and decoders recorded once, and launched as a whole from then on.

A step has thousands of kernels, and a host that launches them one by one is slower than the GPU that runs
them. Recorded, a network is one launch forwards and one backwards. What ranks tell each other (heads,
gradients), the loss and the update stay outside, so that DeepSpeed below ZeRO-3 works as ever.

Source: torch.cuda.make_graphed_callables; https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.cuda import make_graphed_callables
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from cmae_scale.core.collectives import gather_objects
from cmae_scale.layers.tokens import TokenMask
from cmae_scale.models import CMAE


def record_networks_(
    model: CMAE,
    *,
    images: int,
    img_px: int,
    device: torch.device,
    accumulates: bool,
) -> str | None:
    """Have the encoders and decoders of `model` replay what is recorded here, for `images` images at a time.

    None, or why a rank could not record: then all ranks run as before. All of them call it together.

    Other numbers of images, and evaluation, run as before. To be called when parameters lie where they stay
    (after `deepspeed.initialize`) and before threads that use the GPU begin. `accumulates` says that
    gradients outlive the next micro-batch: a recorded network writes them to the same place each time.
    Autocast is the caller's, and has to be without its cache of weights.
    """
    recorders: list[_Recorder] = []
    replays: Any = ()
    failed = None
    try:
        networks = _list_networks(model, images=images, img_px=img_px, device=device)
        recorders = [_Recorder(network, args) for network, args in networks]
        replays = make_graphed_callables(
            tuple(recorder.run for recorder in recorders),
            tuple((*recorder.tensors, *recorder.aliases.values()) for recorder in recorders),
            allow_unused_input=True,
        )
    except RuntimeError as error:  # an operation that cannot be recorded, or too little memory
        failed = next(iter(str(error).strip().splitlines()), type(error).__name__)
    for told in gather_objects(failed):
        if told is not None:
            return str(told)
    for recorder, replay in zip(recorders, replays, strict=True):
        recorder.replace_forward_(replay)
    if accumulates:
        for recorder in recorders:
            for parameter in recorder.network.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(torch.clone)  # type: ignore[no-untyped-call]
    return None


def _list_networks(
    model: CMAE, *, images: int, img_px: int, device: torch.device
) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """The networks in the order of a step, each with arguments as a step has them."""
    view = torch.zeros(images, 3, img_px, img_px, device=device)
    assert model.mask_config is not None
    if model.target_encoder is not None:
        with torch.no_grad():
            ratio = model.target_config.mask_ratio
            yield model.target_encoder, (view, _mask(model, view, ratio=ratio) if ratio else None)
    mask = _mask(model, view, ratio=model.mask_config.ratio)
    with torch.no_grad():
        latents = model.online_encoder(view, mask)
        prediction = model.pixel_decoder(latents, mask)
    yield model.online_encoder, (view.clone(), mask)
    yield model.pixel_decoder, (_leaf(latents), _own(mask))
    if model.feature_decoder is not None:
        if prediction.early is None:
            yield model.feature_decoder, (_leaf(latents), _own(mask))
        else:
            yield model.feature_decoder, (_leaf(prediction.early),)


def _mask(model: CMAE, view: Tensor, *, ratio: float) -> TokenMask:
    noise = torch.zeros(len(view), model.count_cells(), device=view.device)
    return model.draw_mask(view, noise, ratio=ratio)


def _own(mask: TokenMask) -> TokenMask:
    """A copy: each recorded network writes its arguments to a place of its own."""
    return TokenMask(mask.kept.clone(), mask.hidden.clone())


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


class _Unhooked(nn.Module):
    """A network's forward pass as it was written, without what hooks or a replay make of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self._forward = network, network.forward

    def forward(self, *args: Any) -> Any:
        """What the network gives."""
        return self._forward(*args)


class _Recorder:
    """A network as a function of tensors alone, as torch records it: its arguments, then its parameters.

    What is recorded are aliases of the parameters, which lie in the same memory. The parameters themselves
    have hooks of DeepSpeed's, which belong to another stream than the recording's.
    """

    def __init__(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        self.network, self._unhooked = network, _Unhooked(network)
        self.aliases = {
            name: nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            for name, parameter in self._unhooked.named_parameters()
        }
        leaves, self._arguments = tree_flatten(args)
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self._results: Any = None
        self._gives_tensor: list[bool] = []

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The network's results that are tensors."""
        count = len(self.tensors)
        parameters = dict(zip(self.aliases, tensors[count:], strict=True))
        args = _fill(self._arguments, self._is_tensor, tensors[:count])
        leaves, self._results = tree_flatten(functional_call(self._unhooked, parameters, args))
        self._gives_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def replace_forward_(self, replay: Callable[..., Any]) -> None:
        """Have the network's forward pass be `replay` in training, for arguments of the recorded shapes."""
        network, original = self.network, self.network.forward
        shapes, parameters = [tensor.shape for tensor in self.tensors], tuple(network.parameters())

        def forward(*args: Any) -> Any:
            tensors = [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]
            if not network.training or [tensor.shape for tensor in tensors] != shapes:
                return original(*args)
            return _fill(self._results, self._gives_tensor, replay(*tensors, *parameters))

        network.forward = forward


def _fill(spec: Any, is_tensor: list[bool], tensors: Any) -> Any:
    given = iter(tensors)
    return tree_unflatten([next(given) if has else None for has in is_tensor], spec)
