"""The contrast loss: InfoNCE, which is CMAE's, and BYOL's, with which the paper compares it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def infonce(
    query: Float[Tensor, "local dim"], keys: Float[Tensor, "total dim"], *, first_row: int, temperature: float
) -> Float[Tensor, ""]:
    """Mean cross-entropy of this rank's queries against the keys of all ranks.

    Query i belongs to `keys[first_row + i]`; the other keys are its negatives. `keys` is in rank order and
    `first_row` is where this rank's own begin, so the loss needs no process group: gathering is the caller's.
    No gradient reaches the keys. In fp32 whatever comes in, autocast or not: at temperature 0.07 logits reach
    14, where bf16 steps by 1/16. A query that fits no key better than another costs ln(total).

    Source: paper equations 6 and 7. The official head's factor 2 * temperature is the caller's.
    """
    with torch.autocast(query.device.type, enabled=False):
        query = F.normalize(query.float(), dim=-1)
        keys = F.normalize(keys.detach().float(), dim=-1)
        logits = query @ keys.T / temperature
        own_key = first_row + torch.arange(len(query), device=query.device)
        return F.cross_entropy(logits, own_key)


def byol(query: Float[Tensor, "batch dim"], key: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean squared distance of unit vectors, 2 - 2 cos, between each query and its own key: 0 to 4.

    In fp32 whatever comes in. No gradient reaches the keys.

    Source: BYOL (arXiv:2006.07733) equation 2; paper 4.4 compares it with InfoNCE.
    """
    cosine = F.cosine_similarity(query.float(), key.detach().float(), dim=-1)
    return (2 - 2 * cosine).mean()
