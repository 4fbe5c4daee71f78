"""nm_soft_linear: a linear layer on a frozen weight under a learnable, sampled N:M mask."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import boolean, check_is_tensor, check_tensor, describe, fail, number
from maskops._registry import OpSpec, define_op
from maskops.ops.mask_sampling import Seed, seed_tensor
from maskops.ops.nm_matmul.mask import nm_mask
from maskops.ops.nm_matmul.sizes import INT64, as_rows, check_floats, check_last_axis, check_pattern, pattern
from maskops.reference import nm_matmul as reference
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION, PATTERNS, ARGMAX = "nm_soft_linear", "nm_patterns", "nm_mask_of_logits"
MOST_PATTERNS, MOST_LISTED = 128, 1 << 20
_ANY_GPU = "C++ on CPU (AVX-512, AVX2, portable), Triton on GPU; float32, float64, bfloat16, float16"


class SoftLinearOutput(NamedTuple):
    """What nm_soft_linear returns.

    Attributes:
        y: [..., N], the product with the masked weight.
        kept_norm: 0-d, the squared Frobenius norm of the masked weight, sum((weight * mask)^2): a regulariser keeps it large.
    """

    y: Tensor
    kept_norm: Tensor


@public("nm_matmul_soft", native=_ANY_GPU)
def nm_soft_linear(
    x: Tensor, weight: Tensor, logits: Tensor, n: int, m: int, *, tau: float, scale: float = 1.0, seed: Seed = None,
    generator: torch.Generator | None = None, hard: bool = False, backend: str = "auto",
) -> SoftLinearOutput:  # fmt: skip
    """Multiply by a frozen weight under a differentiable random N:M mask that logits describe.

        a = scale * logits + gumbel noise
        logits [N, G, P]:  mask = softmax(a / tau) @ nm_patterns(n, m)              per group, over its P patterns
        logits [N, K]:     p_i = softmax(r_i / tau), r_1 = a, r_{i+1} = r_i + log(1 - p_i), mask = p_1 + ... + p_n, per group
        y = x @ (weight * mask).T;  kept_norm = sum((weight * mask)^2)

    Args:
        x: float [..., K].
        weight: [N, K] in x's dtype, K divisible by m; no gradient flows to it.
        logits: float [N, K / m, P], one per pattern (P = C(m, n) <= 128), or [N, K], one per weight; taken to float32 (float64
            for float64 x).
        n, m: the pattern, 1 <= n < m <= 32.
        tau: temperature, above 0: towards 0 the mask becomes a pattern.
        scale: factor of the logits against the noise.
        seed: int, or an int64 tensor on the device, 0-d or [2] = (seed, offset). Default: drawn from `generator`, else from
            PyTorch's generator of the device.
        generator: a torch.Generator to draw the seed from.
        hard: multiply by the pattern of the largest a (logits [N, K]: the n largest a) while the gradient is the soft mask's.
        backend: "auto", "native", "triton", "reference".

    Returns:
        SoftLinearOutput(y [..., N] in x's dtype, kept_norm 0-d float32 or float64), differentiable (once) in x and logits.

    Notes:
        The same seed gives the same noise on every backend; the gradient draws it again instead of storing it. The soft mask of
        a group sums to n. log(1 - p) is cut off at log(1e-6), for float64 log(1e-12). Ties go to the lower index. Under autocast
        x and weight are lowered, logits are not. For evaluation without noise see nm_mask_of_logits. Deterministic.

    Raises:
        ValueError: wrong dtype, shape or device, m does not divide K, more than 128 patterns, tau not above 0, or a
        scale that is not finite.

    Source:
        MaskLLM (Fang et al., 2024, arXiv 2409.17481); relaxed top-n: Xie and Ermon, 2019, arXiv 1901.10517.

    Example:
        >>> x, weight = torch.ones(2, 8), torch.ones(3, 8)
        >>> out = maskops.nm_soft_linear(x, weight, torch.zeros(3, 2, 6), 2, 4, tau=0.5, seed=0)
        >>> out.y.round(decimals=4).tolist()[0]
        [4.0, 4.0, 4.0]
    """
    n, m = pattern(FUNCTION, n, m)
    for name, tensor in (("weight", weight), ("logits", logits)):
        check_is_tensor(FUNCTION, name, tensor)
    tau, scale = number(FUNCTION, "tau", tau), number(FUNCTION, "scale", scale)
    hard = boolean(FUNCTION, "hard", hard)
    if not -math.inf < scale < math.inf:
        fail(FUNCTION, "scale", "be finite", scale)
    if weight.dim() != 2:
        fail(FUNCTION, "weight", "have shape [N, K]", describe(weight))
    check_last_axis(FUNCTION, x, weight.shape[1])
    op = find_op("nm_matmul_soft", x.device.type, backend)
    words = seed_tensor(seed, generator, x.device, FUNCTION)
    logits = logits.to(accumulation_dtype(x.dtype))
    y, kept = op(as_rows(x), weight.detach(), logits, words, n, m, tau, scale, hard)
    return SoftLinearOutput(y.view(*x.shape[:-1], weight.shape[0]), kept)


def nm_patterns(n: int, m: int) -> Tensor:
    """List every way to keep n of m.

        the n-subsets of (0, ..., m - 1) in lexicographic order: 2:4 = 1100, 1010, 1001, 0110, 0101, 0011

    Args:
        n, m: the pattern, 1 <= n < m <= 32.

    Returns:
        bool [P, m], P = C(m, n), on the CPU.

    Notes:
        The order of the patterns in the logits [N, G, P] of nm_soft_linear.

    Raises:
        ValueError: n and m out of range, or more than 2^20 patterns.

    Source:
        MaskLLM (Fang et al., 2024, arXiv 2409.17481).

    Example:
        >>> maskops.nm_patterns(1, 3).int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    n, m = pattern(PATTERNS, n, m)
    if math.comb(m, n) > MOST_LISTED:
        fail(PATTERNS, "n and m", f"have at most {MOST_LISTED} patterns", f"{math.comb(m, n)}")
    return reference.patterns_of(n, m)


def nm_mask_of_logits(logits: Tensor, n: int, m: int) -> Tensor:
    """Read the most likely mask off logits: what nm_soft_linear learned, without noise.

        logits [N, G, P]: nm_patterns(n, m)[argmax over P];   logits [N, K]: the n largest of each group

    Args:
        logits: float [N, G, P] or [N, K], as in nm_soft_linear.
        n, m: the pattern, 1 <= n < m <= 32.

    Returns:
        bool [N, K], K = G m for logits [N, G, P]; not differentiable.

    Notes:
        Ties go to the lower index; NaN is below everything.

    Raises:
        ValueError: n and m out of range, wrong dtype or shape.

    Source:
        MaskLLM (Fang et al., 2024, arXiv 2409.17481).

    Example:
        >>> maskops.nm_mask_of_logits(torch.tensor([[[0.0, 2.0, 1.0]]]), 1, 3).int().tolist()
        [[0, 1, 0]]
    """
    n, m = pattern(ARGMAX, n, m)
    check_is_tensor(ARGMAX, "logits", logits)
    if logits.dim() == 2:
        check_floats(ARGMAX, "logits", logits, "[N, K]", 2)
        return nm_mask(logits.detach(), n, m)
    check_floats(ARGMAX, "logits", logits, "[N, G, P]", 3)
    if logits.shape[2] != math.comb(m, n):
        fail(ARGMAX, "logits", f"have shape [N, G, P] = [*, *, {math.comb(m, n)}]", describe(logits))
    best = reference.descending_order(logits.detach())[..., 0]
    return nm_patterns(n, m).to(logits.device)[best].flatten(1)


# ---------------------------------------------------------------- the op


def _check(
    x: Tensor, weight: Tensor, logits: Tensor, seed: Tensor, n: int, m: int, tau: float, scale: float, hard: bool
) -> None:
    check_pattern(FUNCTION, n, m)
    check_floats(FUNCTION, "x", x, "[M, K]", 2)
    check_tensor(FUNCTION, "weight", weight, "[N, K]", (x.dtype,), (None, x.shape[1]), x)
    if x.shape[1] % m:
        fail(FUNCTION, "weight", f"have K divisible by m = {m}", describe(weight))
    dtypes, patterns = (accumulation_dtype(x.dtype),), math.comb(m, n)
    check_is_tensor(FUNCTION, "logits", logits)
    if logits.dim() != 3:
        check_tensor(FUNCTION, "logits", logits, "[N, K]", dtypes, weight.shape, x)
    elif patterns > MOST_PATTERNS:
        fail(FUNCTION, "n and m", f"have at most {MOST_PATTERNS} patterns for logits [N, G, P]", patterns)
    else:
        sizes = (weight.shape[0], x.shape[1] // m, patterns)
        check_tensor(FUNCTION, "logits", logits, "[N, G, P]", dtypes, sizes, x)
    check_tensor(FUNCTION, "seed", seed, "[2]", INT64, (2,), x)
    if not tau > 0:
        fail(FUNCTION, "tau", "be above 0", f"{tau:g}")


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, logits, seed, *ctx.options = inputs
    ctx.save_for_backward(x, weight, logits, seed)


def _backward(ops: Any, ctx: Any, grad: Tensor, grad_kept: Tensor) -> tuple:
    need_x, need_logits = ctx.needs[0], ctx.needs[2]
    grad_x, grad_logits = ops._nm_matmul_soft_backward(
        grad, grad_kept, *ctx.saved_tensors, *ctx.options, need_x, need_logits
    )
    return grad_x if need_x else None, None, grad_logits if need_logits else None, *[None] * 6


def _check_backward(grad: Tensor, grad_kept: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> None:
    _check(x, weight, *rest[:-2])
    check_tensor(FUNCTION, "grad", grad, "[M, N]", (x.dtype,), (x.shape[0], weight.shape[0]), x)
    check_tensor(FUNCTION, "grad_kept", grad_kept, "[]", (accumulation_dtype(x.dtype),), (), x)


def _fake_backward(
    grad: Tensor, grad_kept: Tensor, x: Tensor, weight: Tensor, logits: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    need_x, need_logits = rest[-2:]
    return x.new_empty(x.shape if need_x else 0), logits.new_empty(logits.shape if need_logits else 0)


define_op(
    OpSpec(
        "nm_matmul_soft(Tensor x, Tensor weight, Tensor logits, Tensor seed, int n, int m, float tau, float scale,"
        " bool hard) -> (Tensor y, Tensor kept)",
        family="nm_matmul",
        reference=reference.nm_matmul_soft,
        check=_check,
        fake=lambda x, weight, *rest: (
            x.new_empty(x.shape[0], weight.shape[0]),
            x.new_empty((), dtype=accumulation_dtype(x.dtype)),
        ),
        setup=_setup,
        backward=_backward,
        constants=("weight",),
        cuda=False,
        autocast="lower",
        autocast_skips=("logits",),
    )
)
define_op(
    OpSpec(
        "_nm_matmul_soft_backward(Tensor grad, Tensor grad_kept, Tensor x, Tensor weight, Tensor logits, Tensor seed, int n,"
        " int m, float tau, float scale, bool hard, bool need_x, bool need_logits) -> (Tensor grad_x, Tensor grad_logits)",
        family="nm_matmul",
        reference=reference._nm_matmul_soft_backward,
        check=_check_backward,
        fake=_fake_backward,
        cuda=False,
    )
)
