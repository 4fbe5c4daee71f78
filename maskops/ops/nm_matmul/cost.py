"""Which way backend="auto" takes through nm_linear: the sparse kernel, or the dense product with the decompressed weight."""

import torch


def linear_path(M: int, N: int, K: int, n: int, m: int, dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """("sparse" or "dense", the reason) for x [M, K] and a weight [N, K] that keeps n of m.

    torch.compile traces it with symbolic sizes: the reasons are plain strings, without numbers put in.
    """
    # Above this share a sparse kernel reads nearly as much as a dense one, and computes less regularly.
    if 4 * n > 3 * m:
        return "dense", "the pattern keeps more than 3/4 of the weight"
    return "sparse", "the pattern keeps at most 3/4 of the weight"
