"""The projector of both branches, the predictor of the online one, and the batch norm of both."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.config.cmae import HeadsConfig
from cmae_scale.core.collectives import stack_ranks
from cmae_scale.core.errors import ConfigError
from cmae_scale.layers.blocks import ExactLinear


class SyncBatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d of the rows of all ranks together, with its parameters, buffers and state_dict.

    One communication per call: the means and squared deviations of all ranks, combined without the
    cancellation of E[x^2] - E[x]^2. Every rank must bring the same number of rows. In fp32 inside, whatever
    the dtype of input and weights; the output has the input's dtype.

    Differs: torch.nn.SyncBatchNorm runs on GPUs alone; this one gives the same on gloo.
    """

    def forward(self, input: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Rows normalised with the batch's moments in training, with the running ones in evaluation."""
        rows = input.float()
        mean, variance = self._batch_moments(rows) if self.training else self._running_moments()
        scale = self.weight.float() * torch.rsqrt(variance + self.eps)
        return ((rows - mean) * scale + self.bias.float()).to(input.dtype)

    def _running_moments(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var

    def _batch_moments(self, rows: Float[Tensor, "rows dim"]) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over all ranks, with gradient; moves the running moments towards them.

        Source: Chan, Golub, LeVeque 1979 for the combination of means and squared deviations.
        """
        own_mean = rows.mean(dim=0)
        own_deviation = (rows - own_mean).square().sum(dim=0)
        means, deviations = stack_ranks(torch.stack([own_mean, own_deviation])).unbind(dim=1)
        mean = means.mean(dim=0)
        deviation = deviations.sum(dim=0) + len(rows) * (means - mean).square().sum(dim=0)
        total = len(rows) * len(means)
        if total < 2:
            raise ConfigError(
                'cmae.heads.norm "sync_batch" needs at least two images over all ranks: '
                'raise train_micro_batch_size_per_gpu, or write "layer"'
            )
        self._move_running_moments_(mean.detach(), deviation.detach() / (total - 1))
        return mean, deviation / total

    @torch.no_grad()
    def _move_running_moments_(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        running_mean, running_variance = self._running_moments()
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        running_mean.lerp_(mean.to(running_mean.dtype), self.momentum)
        running_variance.lerp_(unbiased_variance.to(running_variance.dtype), self.momentum)
        self.num_batches_tracked += 1


HEAD_NORM_EPS = 1e-6  # Source: official necks/nonlinear_neck.py


class Head(nn.Module):
    """Linear, norm, ReLU, Linear without bias, initialised as torch does.

    Under autocast it stays in its parameters' dtype. What sets images apart is a small part of their pooled
    features, and the norm magnifies it together with any rounding: with heads in bf16 the queries of a new
    ViT-Ti were off by 2.2 %, so by 0.8 %. It is a thousandth of the work.

    Source: official necks/nonlinear_neck.py and config: norm over the batch of all ranks, none at the end.
    """

    def __init__(self, width_in: int, cfg: HeadsConfig) -> None:
        super().__init__()
        self.fc1 = ExactLinear(width_in, cfg.hidden_dim)
        match cfg.norm:
            case "sync_batch":
                self.norm: nn.Module = SyncBatchNorm(cfg.hidden_dim, eps=HEAD_NORM_EPS)
            case "layer":
                self.norm = nn.LayerNorm(cfg.hidden_dim, eps=HEAD_NORM_EPS)
        self.fc2 = ExactLinear(cfg.hidden_dim, cfg.out_dim, bias=False)

    def forward(self, features: Float[Tensor, "batch width_in"]) -> Float[Tensor, "batch width_out"]:
        """Vectors to compare; their length carries nothing."""
        with torch.autocast(features.device.type, enabled=False):
            vectors: Tensor = self.fc2(F.relu(self.norm(self.fc1(features))))
        return vectors


class Projector(Head):
    """From the encoder's width to the space where the branches are compared."""

    def __init__(self, embed_dim: int, cfg: HeadsConfig) -> None:
        super().__init__(embed_dim, cfg)


class Predictor(Head):
    """From online projections to a guess of the target's: the asymmetry that BYOL and MoCo v3 brought in."""

    def __init__(self, cfg: HeadsConfig) -> None:
        super().__init__(cfg.out_dim, cfg)
