"""mask_schedule: how many tokens each step of masked generation decodes."""

import itertools
import math
from collections.abc import Callable

from maskops._checks import boolean, fail, integer, number, one_of

MOST_STEPS = 2**20  # what is returned has an entry for each
FUNCTION = "mask_schedule"
# kind -> gamma(r, N, exponent), the share that stays masked after the share r of the steps
KINDS: dict[str, Callable[[float, int, float], float]] = {
    "cosine": lambda r, N, p: math.cos(math.pi / 2 * r),
    "linear": lambda r, N, p: 1 - r,
    "pow": lambda r, N, p: 1 - r**p,
    "log": lambda r, N, p: -math.log2(r) / math.log2(N) if N > 1 else 0.0,
    "exp": lambda r, N, p: 1 - 2 ** (-math.log2(N) * (1 - r)) if N > 0 else 0.0,
    "arccos": lambda r, N, p: math.acos(r) / (math.pi / 2),
}


def mask_schedule(
    kind: str, steps: int, num_tokens: int, *, exponent: float = 2.5, at_least_one: bool = False
) -> list[int]:
    """Count the tokens that each step of masked generation decodes.

        masked[t] = clamp(floor(N * clip(gamma((t + 1) / T), 1e-6, 1)), 1, unknown - 1);  the last step decodes all
        gamma(r) = cos(pi r / 2) | 1 - r | 1 - r^p | -log2(r) / log2(N) | 1 - 2^(-(1 - r) log2(N)) | 2 arccos(r) / pi

    Args:
        kind: "cosine", "linear", "pow", "log", "exp" or "arccos".
        steps: T, from 1 to 2^20; more than N decode nothing in some steps.
        num_tokens: N, the tokens to decode, below 2^31.
        exponent: p of "pow".
        at_least_one: instead of the rule above the one of MaskGIT-r: differences of floor(N (1 - gamma)), a 0 raised to 1, and
            what that decodes too much taken from the last steps. Needs steps <= num_tokens.

    Returns:
        T counts that add up to N.

    Notes:
        As published, a step decodes at least nothing: where one token is left masked, it waits for the last step. The floor is
        taken of float64 products; where N gamma is a whole number, float32 code may find one less.

    Raises:
        ValueError: another kind, steps or num_tokens out of range.  TypeError: steps or num_tokens is no int.

    Source:
        Chang et al., MaskGIT, 2022 (arXiv 2202.04200), mask_schedule.py and parallel_decode.py; at_least_one: ReCAP, 2025
        (arXiv 2505.19089).

    Example:
        >>> maskops.mask_schedule("cosine", 8, 256)
        [5, 15, 24, 31, 39, 45, 48, 49]
    """
    steps, N = integer(FUNCTION, "steps", steps), integer(FUNCTION, "num_tokens", num_tokens)
    one_of(FUNCTION, "kind", kind, KINDS)
    boolean(FUNCTION, "at_least_one", at_least_one)
    exponent = number(FUNCTION, "exponent", exponent)
    if not 1 <= steps <= MOST_STEPS:
        fail(FUNCTION, "steps", f"be in [1, {MOST_STEPS}]", steps)
    if not 0 <= N < 2**31:
        fail(FUNCTION, "num_tokens", "be in [0, 2^31)", N)
    if at_least_one and steps > N:
        fail(FUNCTION, "steps", f"be at most num_tokens = {N} with at_least_one", steps)
    if not 0 < exponent < math.inf:
        fail(FUNCTION, "exponent", "be positive and finite", exponent)
    shares = [min(max(KINDS[kind]((t + 1) / steps, N, exponent), 1e-6), 1.0) for t in range(steps)]
    if at_least_one:
        return _differences(shares, steps, N)
    counts, unknown = [], N
    for share in shares[:-1]:
        masked = max(1, min(unknown - 1, math.floor(N * share)))
        counts.append(max(0, unknown - masked))
        unknown = min(unknown, masked)
    return [*counts, unknown]


def _differences(shares: list[float], steps: int, N: int) -> list[int]:
    done = [0, *(math.floor(N * (1 - share)) for share in shares[:-1]), N]
    counts = [max(1, b - a) for a, b in itertools.pairwise(done)]
    surplus = sum(counts) - N
    for t in reversed(range(steps)):
        taken = min(surplus, counts[t] - 1)
        counts[t] -= taken
        surplus -= taken
    return counts
