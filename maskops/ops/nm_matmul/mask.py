"""Which weights an N:M pattern keeps: masks by score, transposable masks, and the check that a weight has the pattern."""

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import boolean, check_is_tensor, fail, integer
from maskops._registry import OpSpec, define_op
from maskops.ops.nm_matmul.sizes import check_floats, check_has_values, check_pattern, groups_in, on_rows, pattern
from maskops.ops.nm_matmul.transposable import transposable_mask
from maskops.reference import nm_matmul as reference

FUNCTION, VALIDATE = "nm_mask", "nm_validate"


@public("nm_matmul_mask")
def nm_mask(
    scores: Tensor, n: int, m: int, dim: int = -1, *, transposable: bool = False, backend: str = "auto"
) -> Tensor:
    """Keep the n largest scores of every m consecutive ones.

        kept[r, g m + i] = scores[r, g m + i] is one of the n largest of scores[r, g m : (g + 1) m]

    Args:
        scores: float, any shape; the magnitude of weights, say.
        n, m: how many to keep of how many, 1 <= n < m <= 32.
        dim: the axis along which the groups lie: the inputs of a linear layer are -1, of a convolution 1.
        transposable: keep n per row and per column of each m x m block of the last two axes, so that the mask is N:M for the
            weight and for its transpose (dim is then -1 or -2).
        backend: "auto", "native", "triton", "reference". Transposable masks are composed of PyTorch ops on every backend.

    Returns:
        bool in scores' shape, True = kept; not differentiable.

    Notes:
        Of equal scores the lower index is kept; -0.0 equals 0.0; NaN is below everything and kept only if too little else is
        there. A last group of w < m scores keeps min(n, w). Empty axes work. Deterministic.
        Transposable: for m <= 4 the mask of the largest total score (of equals, the first one, its rows read as patterns in
        lexicographic order), for larger m a good one: scores are taken in descending order wherever row and column have room,
        then missing pairs are filled by the exchange that gains most.

    Raises:
        ValueError: wrong dtype, n and m out of range, or transposable with sizes that m does not divide.

    Source:
        N:M masks: Zhou et al., 2021, arXiv 2102.04010; transposable masks: Hubara et al., 2021, arXiv 2102.08124.

    Example:
        >>> maskops.nm_mask(torch.tensor([[0.1, 3.0, -2.0, 0.5, 1.0]]), 2, 4).int().tolist()
        [[0, 1, 0, 1, 1]]
    """
    n, m = pattern(FUNCTION, n, m)
    check_is_tensor(FUNCTION, "scores", scores)
    op = find_op("nm_matmul_mask", scores.device.type, backend)
    dim = integer(FUNCTION, "dim", dim)
    if not boolean(FUNCTION, "transposable", transposable):
        return on_rows(FUNCTION, "scores", scores, dim, lambda rows: op(rows, n, m))
    if dim not in (-1, -2, scores.dim() - 1, scores.dim() - 2):
        fail(FUNCTION, "dim", "be one of the last two axes for a transposable mask", dim)
    return transposable_mask(FUNCTION, scores, n, m)


def nm_validate(weight: Tensor, n: int, m: int, dim: int = -1) -> None:
    """Raise if a weight keeps more than n of some m consecutive values.

        max over groups of count_nonzero(weight[r, g m : (g + 1) m]) <= n

    Args:
        weight: float, any shape.
        n, m: the pattern, 1 <= n < m <= 32.
        dim: the axis along which the groups lie.

    Returns:
        None.

    Notes:
        NaN counts as nonzero, -0.0 as zero. Asks the device: not for compiled programs.

    Raises:
        ValueError: the first group with too many nonzeros is named with its position and contents, and how many groups there
            are like it.

    Source:
        N:M weights: Zhou et al., 2021, arXiv 2102.04010.

    Example:
        >>> maskops.nm_validate(torch.tensor([[1.0, 0, 2, 0], [1, 2, 3, 0]]), 2, 4)
        Traceback (most recent call last):
        ValueError: nm_validate: weight[1, 0:4] must have at most 2 nonzeros, got [1, 2, 3, 0]; too many in 1 of 2 groups
    """
    n, m = pattern(VALIDATE, n, m)
    dim = integer(VALIDATE, "dim", dim)

    def check_rows(rows: Tensor) -> Tensor:
        check_floats(VALIDATE, "weight", rows, "[..., K]", 2)
        check_has_values(VALIDATE, "weight", rows)
        check_groups(VALIDATE, rows, n, m, weight.movedim(dim, -1).shape[:-1], dim % weight.dim())
        return rows

    on_rows(VALIDATE, "weight", weight, dim, check_rows)


def check_groups(
    op: str, rows: Tensor, n: int, m: int, leading: tuple[int, ...] | None = None, dim: int | None = None
) -> None:
    """At most n nonzeros in every m of rows [R, K]; the message gives the place in the tensor that the rows come from.

    leading: sizes of that tensor without its axis `dim`; None: the rows themselves.
    """
    groups = reference.groups_of(rows, m, 0.0)
    full = (groups != 0).sum(-1) > n
    if not full.any():
        return
    row, group = torch.nonzero(full)[0].tolist()
    at = _unravel(row, (rows.shape[0],) if leading is None else leading)
    start, stop = group * m, min(group * m + m, rows.shape[1])
    at.insert(len(at) if dim is None else dim, f"{start}:{stop}")
    contents = ", ".join(f"{value:g}" for value in rows[row, start:stop].tolist())
    total = rows.shape[0] * groups_in(rows.shape[1], m)
    expected = f"have at most {n} nonzeros"
    fail(op, f"weight[{', '.join(at)}]", expected, f"[{contents}]; too many in {int(full.sum())} of {total} groups")


def _unravel(row: int, sizes: tuple[int, ...]) -> list[str]:
    at = []
    for size in reversed(sizes):
        at.insert(0, str(row % size))
        row //= size
    return at


# ---------------------------------------------------------------- the op


def _check(scores: Tensor, n: int, m: int) -> None:
    check_pattern(FUNCTION, n, m)
    check_floats(FUNCTION, "scores", scores, "[R, K]", 2)


define_op(
    OpSpec(
        "nm_matmul_mask(Tensor scores, int n, int m) -> Tensor",
        family="nm_matmul",
        reference=reference.nm_matmul_mask,
        check=_check,
        fake=lambda scores, n, m: scores.new_empty(scores.shape, dtype=torch.bool),
    )
)
