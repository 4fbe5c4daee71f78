"""Reference of pooling in the family sparse_conv: N rows read, M written, K places of the kernel, C channels, S segments.

A kernel map [K, M] says which rows each row of the result reads, -1 for none. A segment s owns the rows order[begin[s] + i],
i below count[s].
"""

import torch
from torch import Tensor

from maskops.reference.visible_tokens import accumulation_dtype


def sparse_conv_sum_pool(
    x: Tensor, map: Tensor, reverse: Tensor | None, read_scale: Tensor | None, scale: Tensor | None
) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    out = x.new_zeros((map.shape[1], x.shape[1]), dtype=dtype)
    for n in map:
        m = torch.nonzero(n >= 0)[:, 0]
        read = x[n[m].long()].to(dtype)
        out[m] += read if read_scale is None else read * read_scale[n[m].long(), None]
    return (out if scale is None else out * scale[:, None]).to(x.dtype)


def better(x: Tensor, best: Tensor, arg: Tensor) -> Tensor:
    """Whether x takes the place of best: the first one, a larger one, or the first NaN."""
    return (arg < 0) | (x > best) | (x.isnan() & ~best.isnan())


def sparse_conv_max_pool(x: Tensor, map: Tensor, reverse: Tensor | None) -> tuple[Tensor, Tensor]:
    best = x.new_zeros((map.shape[1], x.shape[1]))
    arg = map.new_full(best.shape, -1)
    for n in map:
        m = torch.nonzero(n >= 0)[:, 0]
        read = x[n[m].long()]
        takes = better(read, best[m], arg[m])
        best[m] = torch.where(takes, read, best[m])
        arg[m] = torch.where(takes, n[m, None], arg[m])
    return best, arg


def _sparse_conv_max_backward(grad: Tensor, arg: Tensor, reverse: Tensor) -> Tensor:
    out = grad.new_zeros((reverse.shape[1], grad.shape[1]), dtype=accumulation_dtype(grad.dtype))
    for m in reverse:
        n = torch.nonzero(m >= 0)[:, 0]
        at = m[n].long()
        out[n] += torch.where(arg[at] == n[:, None], grad[at], 0)
    return out.to(grad.dtype)


def rows_of_segments(order: Tensor, begin: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(the segment of each row that is read, the row), segment by segment."""
    lengths = count.long()
    segment = torch.repeat_interleave(torch.arange(len(count), device=count.device), lengths)
    rank = torch.arange(len(segment), device=count.device) - (lengths.cumsum(0) - lengths)[segment]
    return segment, order[begin[segment].long() + rank].long()


def sparse_conv_segment_sum(
    x: Tensor, order: Tensor, begin: Tensor, count: Tensor, inverse: Tensor, scale: Tensor | None
) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    segment, row = rows_of_segments(order, begin, count)
    out = x.new_zeros((len(count), x.shape[1]), dtype=dtype).index_add_(0, segment, x[row].to(dtype))
    return (out if scale is None else out * scale[:, None]).to(x.dtype)


def sparse_conv_segment_spread(
    x: Tensor, order: Tensor, begin: Tensor, count: Tensor, inverse: Tensor, scale: Tensor | None
) -> Tensor:
    rows = x.to(accumulation_dtype(x.dtype))
    rows = rows if scale is None else rows * scale[:, None]
    out = rows.new_zeros((len(inverse), x.shape[1]))
    out[inverse >= 0] = rows[inverse[inverse >= 0].long()]
    return out.to(x.dtype)


def sparse_conv_segment_max(
    x: Tensor, order: Tensor, begin: Tensor, count: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    best = x.new_zeros((len(count), x.shape[1]))
    arg = order.new_full(best.shape, -1)
    segment, row = rows_of_segments(order, begin, count)
    at = torch.arange(len(segment), device=order.device)[:, None].expand(-1, x.shape[1])
    top = best.scatter_reduce(0, segment[:, None].expand_as(at), x[row], "amax", include_self=False)
    wins = (x[row] == top[segment]) | (x[row].isnan() & top[segment].isnan())
    first = at.new_full(best.shape, len(segment))
    first.scatter_reduce_(0, segment[:, None].expand_as(at), torch.where(wins, at, len(segment)), "amin")
    some = first < len(segment)
    arg = torch.where(some, order.new_tensor(0) if not len(row) else row.int()[first.clamp(max=len(row) - 1)], arg)
    return torch.where(some, top, best), arg.int()
