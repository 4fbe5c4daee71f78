"""Moving spans to the end of a row behind sentinels, and back: the causal masking of CM3."""

from typing import NamedTuple

import torch
from torch import Tensor

from maskops._checks import check_tensor, check_values, integer

INT64 = (torch.int64,)


class MovedSpans(NamedTuple):
    """What move_spans returns.

    ids: int64 [B, W]; source: int64 [B, W], the position that each token comes from, -1 for padding, below -1 for sentinels and the
    end; lengths: int64 [B]; predicted: bool [B, W], the tokens that a loss counts, which are the originals and the end.
    """

    ids: Tensor
    source: Tensor
    lengths: Tensor
    predicted: Tensor


def _pieces(sizes: Tensor, first: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Lay pieces behind one another.  sizes, first [B, M] -> where each of width places comes from (a negative `first` is a code of
    its own, -1 past the end), and the rows' lengths."""
    ends = sizes.cumsum(1)
    at = torch.arange(width, device=sizes.device).expand(sizes.shape[0], -1)
    piece = torch.searchsorted(ends, at.contiguous(), right=True).clamp(max=sizes.shape[1] - 1)
    begin = first.gather(1, piece)
    source = torch.where(begin < 0, begin, begin + at - (ends - sizes).gather(1, piece))
    return torch.where(at < ends[:, -1:], source, -1), ends[:, -1]


def _check_row_lengths(name: str, lengths: Tensor, width: int) -> None:
    check_values(name, "lengths", (lengths >= 0) & (lengths <= width), f"be in [0, {int(width)}]", lengths)


def _check_sentinels(name: str, sentinels: Tensor) -> None:
    once = (sentinels[:, None] == sentinels).sum(1) == 1
    check_values(name, "sentinels", once, "differ from one another", sentinels)


def _check_spans(name: str, spans: Tensor, lengths: Tensor) -> None:
    there = spans[:, :, 0] >= 0
    before = torch.nn.functional.pad(spans[:, :-1], (0, 0, 1, 0)) if spans.shape[1] else spans
    begin, end = spans.unbind(2)
    follows = (before[:, :, 1] <= begin) & (before[:, :, 0] >= 0) & (begin <= end) & (end <= lengths[:, None])
    good = torch.where(there, follows, (begin == -1) & (end == -1))
    expected = "ascend without overlap within the row's length, -1 past the last"
    check_values(name, "spans", good[:, :, None].expand(spans.shape), expected, spans)


def move_spans(
    ids: Tensor, spans: Tensor, sentinels: Tensor, *, lengths: Tensor | None = None, end_id: int | None = None,
    pad_id: int = 0,
) -> MovedSpans:  # fmt: skip
    """Move spans to the end of their row, each behind a sentinel that also stands where the span was.

        a b c d e, spans [b] and [d e]   ->   a <0> c <1>  <0> b  <1> d e  <end>

    Args:
        ids: int64 [B, N].
        spans: int64 [B, S, 2], ascending, without overlap, -1 past the last: draw_spans.
        sentinels: int64 [S], ids that stand nowhere else.
        lengths: int64 [B], real tokens of each row. Default: N.
        end_id: appended where given.
        pad_id: fills the rest.

    Returns:
        MovedSpans, of width W = N + 2 S, and one more with end_id.

    Notes:
        One gather with computed positions. A row without spans is copied. Every original token is there exactly once.

    Raises:
        ValueError: wrong dtype or shape, spans out of order or of the row, equal sentinels.  TypeError: an id that is no int.

    Source:
        CM3 (Aghajanyan et al., 2022, arXiv 2201.07520).

    Example:
        >>> moved = maskops.move_spans(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[[1, 2], [3, 5]]]), torch.tensor([90, 91]))
        >>> moved.ids.tolist()
        [[1, 90, 3, 91, 90, 2, 91, 4, 5]]
    """
    name = "move_spans"
    pad_id = integer(name, "pad_id", pad_id)
    end_id = None if end_id is None else integer(name, "end_id", end_id)
    check_tensor(name, "ids", ids, "[B, N]", INT64, (None, None), ids)
    B, N = ids.shape
    check_tensor(name, "spans", spans, "[B, S, 2]", INT64, (B, None, 2), ids)
    S = spans.shape[1]
    check_tensor(name, "sentinels", sentinels, "[S]", INT64, (S,), ids)
    real = torch.full((B,), N, dtype=torch.int64, device=ids.device) if lengths is None else lengths
    check_tensor(name, "lengths", real, "[B]", INT64, (B,), ids)
    _check_sentinels(name, sentinels)
    _check_row_lengths(name, real, N)
    _check_spans(name, spans, real)
    there = spans[:, :, 0] >= 0
    begins, ends = (torch.where(there, spans[:, :, i], real[:, None]) for i in (0, 1))
    codes = (-2 - torch.arange(S, device=ids.device)).expand(B, S)
    starts = torch.nn.functional.pad(ends, (1, 0))
    gaps = torch.cat([begins, real[:, None]], 1) - starts
    one = there.long()
    front = torch.stack([gaps[:, :-1], one], 2).flatten(1), torch.stack([starts[:, :-1], codes], 2).flatten(1)
    back = torch.stack([one, ends - begins], 2).flatten(1), torch.stack([codes, begins], 2).flatten(1)
    last = torch.full((B, 1), int(end_id is not None), device=ids.device)
    sizes = torch.cat([front[0], gaps[:, -1:], back[0], last], 1)
    first = torch.cat([front[1], starts[:, -1:], back[1], torch.full_like(last, -2 - S)], 1)
    source, total = _pieces(sizes, first, N + 2 * S + int(end_id is not None))
    special = torch.cat([sentinels, sentinels.new_tensor([pad_id if end_id is None else end_id])])
    out = torch.where(source >= 0, _at(ids, source), special[(-2 - source).clamp(0, S)])
    out = torch.where(source == -1, pad_id, out)
    return MovedSpans(out, source, total, (source >= 0) | (source == -2 - S))


def _at(ids: Tensor, source: Tensor) -> Tensor:
    if ids.shape[1] == 0:
        return torch.zeros_like(source)
    return ids.gather(1, source.clamp(min=0))


def restore_spans(
    ids: Tensor, sentinels: Tensor, *, lengths: Tensor | None = None, end_id: int | None = None, pad_id: int = 0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Put moved spans back where they were: the inverse of move_spans, also for spans that a model wrote.

        a <0> c <1>  <0> b  <1> d e  <end>   ->   a b c d e

    Args:
        ids: int64 [B, W], each sentinel of a row twice, first where the span was, then in front of it.
        sentinels: int64 [S], in the order of their use.
        lengths: int64 [B], real tokens of each row, such as MovedSpans.lengths. Default: W.
        end_id: dropped where it is a row's last token.
        pad_id: fills the rest.

    Returns:
        ids int64 [B, W] without sentinels, padded, and their lengths int64 [B].

    Notes:
        A span may have another length than it had, or none. A sentinel that stands once only stays, as a token.

    Raises:
        ValueError: wrong dtype or shape, lengths out of range, equal sentinels.  TypeError: an id that is no int.

    Source:
        CM3 (Aghajanyan et al., 2022, arXiv 2201.07520).

    Example:
        >>> ids, lengths = maskops.restore_spans(torch.tensor([[1, 90, 3, 90, 7, 8]]), torch.tensor([90]))
        >>> ids[0, : lengths[0]].tolist()
        [1, 7, 8, 3]
    """
    name = "restore_spans"
    pad_id = integer(name, "pad_id", pad_id)
    end_id = None if end_id is None else integer(name, "end_id", end_id)
    check_tensor(name, "ids", ids, "[B, W]", INT64, (None, None), ids)
    B, W = ids.shape
    check_tensor(name, "sentinels", sentinels, "[S]", INT64, (None,), ids)
    real = torch.full((B,), W, dtype=torch.int64, device=ids.device) if lengths is None else lengths
    check_tensor(name, "lengths", real, "[B]", INT64, (B,), ids)
    _check_sentinels(name, sentinels)
    _check_row_lengths(name, real, W)
    at = torch.arange(W, device=ids.device)
    if end_id is not None:
        is_last = (at == real[:, None] - 1) & (ids == end_id)
        real = real - is_last.any(1).long()
    # The first and the second place of every sentinel; both at the row's end where it does not stand twice.
    here = (ids[:, None] == sentinels[:, None]) & (at < real[:, None, None])
    twice = here.sum(2) > 1
    places = torch.where(here, at, W)
    first = torch.where(twice, places.amin(2) if W else places.sum(2), real[:, None])
    second = torch.where(here, at, -1).amax(2) if W else places.sum(2)
    second = torch.where(twice, second, real[:, None])
    tail = second.amin(1, keepdim=True) if sentinels.numel() else real[:, None]
    first = torch.minimum(first, tail)
    starts = torch.nn.functional.pad(first + twice.long(), (1, 0))
    gaps = torch.cat([first, tail], 1) - starts
    stops = torch.cat([second[:, 1:], real[:, None]], 1)
    spans = torch.where(twice, stops - second - 1, 0)
    sizes = torch.cat([torch.stack([gaps[:, :-1], spans], 2).flatten(1), gaps[:, -1:]], 1).clamp(min=0)
    begin = torch.cat([torch.stack([starts[:, :-1], second + 1], 2).flatten(1), starts[:, -1:]], 1)
    source, total = _pieces(sizes, begin, W)
    return torch.where(source == -1, pad_id, _at(ids, source)), total
