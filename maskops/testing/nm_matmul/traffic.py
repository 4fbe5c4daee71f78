"""The least bytes and flops of the ops of nm_matmul."""

from torch import Tensor

from maskops.ops.nm_matmul.sizes import groups_in, index_bytes, mask_bytes


def size_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _compressed_bytes(x: Tensor, outputs: int, K: int, n: int, m: int) -> int:
    """Of a weight [outputs, K] in x's dtype: values and indices."""
    slots = groups_in(K, m) * n
    return outputs * (slots * x.element_size() + index_bytes(slots, m))


def _compress_bytes(weight: Tensor, n: int, m: int) -> int:
    return size_of(weight) + _compressed_bytes(weight, *weight.shape, n, m)


def _decompress_bytes(values: Tensor, indices: Tensor, n: int, m: int, K: int) -> int:
    return size_of(values, indices) + values.shape[0] * K * values.element_size()


def _select_bytes(dense: Tensor, indices: Tensor, n: int, m: int) -> int:
    """Reads the kept values only."""
    slots = groups_in(dense.shape[1], m) * n
    kept = sum(min(n, dense.shape[1] - start) for start in range(0, dense.shape[1], m))
    return size_of(indices) + dense.shape[0] * (kept + slots) * dense.element_size()


def _linear_bytes(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> int:
    return size_of(x, values, indices, bias) + x.shape[0] * values.shape[0] * x.element_size()


def linear_flops(x: Tensor, values: Tensor) -> int:
    """Of the kept weights: a dense product takes m / n times as many."""
    return 2 * x.shape[0] * values.numel()


def _linear_backward_bytes(
    grad: Tensor, x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, need_x: bool, need_values: bool
) -> int:
    read = size_of(grad, indices) + size_of(values) * need_x + size_of(x) * need_values
    return read + size_of(x) * need_x + size_of(values) * need_values


def _pack_bytes(mask: Tensor) -> int:
    return size_of(mask) + mask.shape[0] * mask_bytes(mask.shape[1])


def _bitmask_bytes(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, scores: Tensor | None) -> int:
    return size_of(x, weight, bits, bias) + x.shape[0] * x.shape[1] * weight.shape[0] * x.element_size()


def bitmask_flops(x: Tensor, weight: Tensor) -> int:
    """Of the dense product: a mask of any density saves bytes, not multiplications."""
    return 2 * x.shape[0] * x.shape[1] * weight.numel()


def _bitmask_backward_bytes(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, need_x: bool, need_weight: bool, need_scores: bool,
    scores_per_sample: bool,
) -> int:  # fmt: skip
    read = size_of(grad) + size_of(bits) * (need_x or need_weight) + size_of(x) * (need_weight or need_scores)
    read += size_of(weight) * (need_x or need_scores)
    scores = size_of(weight) * (x.shape[0] if scores_per_sample else 1)
    return read + size_of(x) * need_x + size_of(weight) * need_weight + scores * need_scores


def _soft_bytes(x: Tensor, weight: Tensor, logits: Tensor, seed: Tensor, *rest: object) -> int:
    out = x.shape[0] * weight.shape[0] * x.element_size() + logits.element_size()
    return size_of(x, weight, logits, seed) + out


def soft_flops(x: Tensor, weight: Tensor) -> int:
    """Of the product; the mask takes some tens more per logit, exp and log included."""
    return 2 * x.shape[0] * weight.numel()


def _soft_backward_bytes(
    grad: Tensor, grad_kept: Tensor, x: Tensor, weight: Tensor, logits: Tensor, seed: Tensor, *rest: object
) -> int:
    need_x, need_logits = rest[-2:]
    read = size_of(grad, grad_kept, weight, logits, seed) + size_of(x) * need_logits
    return read + size_of(x) * need_x + size_of(logits) * need_logits


TRAFFIC = {
    "nm_matmul_mask": lambda scores, n, m: size_of(scores) + scores.numel(),
    "nm_matmul_compress": _compress_bytes,
    "nm_matmul_decompress": _decompress_bytes,
    "nm_matmul_select": _select_bytes,
    "nm_matmul_linear": _linear_bytes,
    "_nm_matmul_linear_backward": _linear_backward_bytes,
    "nm_matmul_pack": _pack_bytes,
    "nm_matmul_bitmask": _bitmask_bytes,
    "_nm_matmul_bitmask_backward": _bitmask_backward_bytes,
    "nm_matmul_soft": _soft_bytes,
    "_nm_matmul_soft_backward": _soft_backward_bytes,
}
