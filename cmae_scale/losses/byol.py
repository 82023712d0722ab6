"""The contrastive loss without negatives."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def byol(query: Float[Tensor, "batch dim"], key: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean squared distance of unit vectors, 2 - 2 cos, between each query and its own key: 0 to 4.

    In fp32 whatever comes in. No gradient reaches the keys.

    Source: BYOL (arXiv:2006.07733) equation 2; paper 4.4 compares it with InfoNCE.
    """
    cosine = F.cosine_similarity(query.float(), key.detach().float(), dim=-1)
    return (2 - 2 * cosine).mean()
