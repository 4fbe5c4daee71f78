"""What the calls of several families start from."""

import torch
from torch import Tensor

import maskops
from maskops import TokenSplit
from maskops.ops.mask_sampling import seed_tensor

DIM = 18  # like no other size, or "duck sizing" ties the two together


def tokens(batch: int, count: int) -> tuple[Tensor, TokenSplit]:
    return torch.randn(batch, count, DIM), maskops.random_masking(batch, count, 0.75, seed=1)


def seed() -> Tensor:
    return seed_tensor(3, None, torch.device("cpu"))
