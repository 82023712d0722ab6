"""Random generators that depend on what they are for and on the step alone, so any step can be run again."""

import hashlib

import torch


def step_generator(seed: int, *, step: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose ("views", "mask") of one step: equal on all ranks and restarts."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
