"""Which way backend="auto" takes through nm_linear: the sparse kernel, or the dense product with the decompressed weight."""

import torch

# Above this share of kept weights a sparse kernel reads nearly as much as a dense one and computes less regularly.
DENSE_SHARE = 0.75


def linear_path(M: int, N: int, K: int, n: int, m: int, dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """("sparse" or "dense", the reason) for x [M, K] and a weight [N, K] that keeps n of m."""
    if n > DENSE_SHARE * m:
        return "dense", f"the pattern keeps more than {DENSE_SHARE:.0%} of the weight"
    return "sparse", f"the pattern keeps at most {DENSE_SHARE:.0%} of the weight"
