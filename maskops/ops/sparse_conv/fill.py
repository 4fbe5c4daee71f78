"""neighbour_fill and the masks of what dense layers know: B images, C channels, H x W places, mask True where a place is known."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_is_tensor, check_tensor, describe, fail, integer, number, sizes_of
from maskops._registry import OpSpec, define_op
from maskops.reference import sparse_conv_fill as reference

FUNCTION = "neighbour_fill"
BOOL = (torch.bool,)


@public("sparse_conv_fill", native="C++ on CPU; on CUDA the Triton kernel; float32, float64, bfloat16, float16")
def neighbour_fill(
    x: Tensor, mask: Tensor, iterations: int = 1, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Fill unknown places with the average of the known ones around them, ring after ring.

        repeat: unknown = sum of the known in 3 x 3 / (their number + eps);  known = known or number > 0

    Args:
        x: float [B, C, H, W].
        mask: bool [B, 1, H, W], True where x is known.
        iterations: rings to fill, at least 0. A convolution of width k reads no unknown place next to a known one after k.
        eps: 1e-5 as published.
        backend: "auto", "native", "triton", "reference".

    Returns:
        x with filled places, in its dtype, 0 where nothing is known yet; bool [B, 1, H, W], what is known now.

    Notes:
        What stands in x at unknown places is never read: not a bit of the result depends on it. As published, the gradient takes
        fills for constants: it is that of the known places. Sums are in float32 (float64 for float64) over all iterations.

    Raises:
        ValueError: wrong dtype, shape or device, iterations below 0, eps below 0.  TypeError: an argument of another type.

    Source:
        Balasubramanian, Feizi: Towards Improved Input Masking for Convolutional Neural Networks, 2023 (arXiv 2211.14646).

    Example:
        >>> x, mask = torch.tensor([[[[3.0, 9.0, 9.0]]]]), torch.tensor([[[[True, False, False]]]])
        >>> filled, known = maskops.neighbour_fill(x, mask, 1, eps=0.0)
        >>> filled.tolist(), known.tolist()
        ([[[[3.0, 3.0, 0.0]]]], [[[[True, True, False]]]])
    """
    check_is_tensor(FUNCTION, "x", x)
    check_is_tensor(FUNCTION, "mask", mask)
    op = find_op("sparse_conv_fill", x.device.type, backend)
    return op(x, mask, integer(FUNCTION, "iterations", iterations), number(FUNCTION, "eps", eps))


def downsample_mask(
    mask: Tensor, kernel_size: int | Sequence[int], stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:  # fmt: skip
    """Tell which places of a convolution or pool of these sizes read a place that is known.

    Args:
        mask: bool [B, 1, H, W], True where a place is known.
        kernel_size, stride, padding, dilation: as of the layer; int, or one per axis.

    Returns:
        bool [B, 1, H', W'].

    Notes:
        The largest value of the mask under the kernel; nothing is known outside of the image.

    Raises:
        ValueError: wrong dtype, shape or sizes.  TypeError: an argument of another type.

    Source:
        Balasubramanian, Feizi, 2023 (arXiv 2211.14646).

    Example:
        >>> maskops.downsample_mask(torch.tensor([[[[True, False, False, False]]]]), (1, 2), stride=(1, 2)).tolist()
        [[[[True, False]]]]
    """
    name = "downsample_mask"
    check_is_tensor(name, "mask", mask)
    check_tensor(name, "mask", mask, "[B, 1, H, W]", BOOL, (None, 1, None, None), mask)
    sizes = []
    for argument, value, least in (
        ("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1),
    ):  # fmt: skip
        sizes.append(sizes_of(name, argument, value, 2, least))
    size, stride, padding, dilation = sizes
    for axis, n in enumerate(mask.shape[2:]):
        if n + 2 * padding[axis] < dilation[axis] * (size[axis] - 1) + 1:
            expected = f"reach no further than the {int(n)} + 2 x {padding[axis]} places of axis {axis + 2} of mask"
            fail(name, "kernel_size", expected, f"{size} with dilation {dilation}")
    if 0 in mask.shape:  # of which torch's pools know nothing
        found = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(mask.shape[2:], *sizes, strict=True))
        return mask.new_zeros((*mask.shape[:2], *found))
    # Padded by hand: torch's pools refuse more padding than half the kernel, which dilated convolutions have.
    known = F.pad(mask.float(), (padding[1], padding[1], padding[0], padding[0]))
    return F.max_pool2d(known, size, stride, 0, dilation) > 0


def _check(x: Tensor, mask: Tensor, iterations: int, eps: float) -> None:
    op = FUNCTION
    check_tensor(op, "x", x, "[B, C, H, W]", FLOATS, (None, None, None, None), x)
    check_tensor(op, "mask", mask, "[B, 1, H, W]", BOOL, (x.shape[0], 1, x.shape[2], x.shape[3]), x)
    if isinstance(x.shape[2] * x.shape[3], int) and x.shape[2] * x.shape[3] >= 2**31:
        fail(op, "x", "have fewer than 2^31 places", describe(x))
    if iterations < 0:
        fail(op, "iterations", "be at least 0", int(iterations))
    if not 0 <= eps < 1e300:
        fail(op, "eps", "be at least 0 and below 1e300", f"{eps:g}")


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[1])


def _backward(ops: Any, ctx: Any, grad: Tensor, _: Any) -> tuple:
    return torch.where(ctx.saved_tensors[0], grad, 0), None, None, None


define_op(
    OpSpec(
        "sparse_conv_fill(Tensor x, Tensor mask, SymInt iterations, float eps) -> (Tensor, Tensor)",
        family="sparse_conv",
        reference=reference.sparse_conv_fill,
        check=_check,
        fake=lambda x, mask, *_: (x.new_empty(x.shape), mask.new_empty(mask.shape)),
        setup=_setup,
        backward=_backward,
        cuda=False,
    )
)
