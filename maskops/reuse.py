"""What masked generation reuses: which steps forward all tokens, and which only a few.  For maskops.generation.

N tokens, P prefix positions, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maskops._checks import integer, number


@dataclass(frozen=True)
class FullOnly:
    """Every step forwards all tokens: MaskGIT, MAGE."""

    def groups(self, counts: Sequence[int]) -> list[list[int]]:
        return [[n] for n in counts]


@dataclass(frozen=True)
class ReCAP:
    """The first pre_full steps alone, then groups of a full step and local_steps local ones.  Liu et al., 2025 (arXiv 2505.19089).

    A full step chooses U, the tokens that its whole group decodes. A local step forwards U only; the keys and values of all other
    tokens, decoded or still masked, are those of the full step.
    """

    pre_full: int
    local_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("pre_full", "local_steps"):
            if integer("ReCAP", name, getattr(self, name)) < 0:
                raise ValueError(f"ReCAP: {name} must be at least 0, got {getattr(self, name)}")

    def groups(self, counts: Sequence[int]) -> list[list[int]]:
        first, rest, size = counts[: self.pre_full], counts[self.pre_full :], 1 + self.local_steps
        return [[n] for n in first] + [list(rest[i : i + size]) for i in range(0, len(rest), size)]


@dataclass(frozen=True)
class BlockCache:
    """Blocks of a sequence from left to right, as diffusion language models do: Wu et al., Fast-dLLM, 2025 (arXiv 2505.22618).

    Args:
        block_size: tokens of a block.
        mode: "dual": local steps forward the block, all else is cached; "prefix": they forward the block and what follows it.
        threshold: decode all tokens of the block of which p is above, at least one a step; None: block_size / steps each step.
        steps: per block, without a threshold. Default: one token a step.
        refresh: a full step every so many steps of a block; 1: always. Default: the first step only.
    """

    block_size: int
    mode: str = "dual"
    threshold: float | None = None
    steps: int | None = None
    refresh: int | None = None

    def __post_init__(self) -> None:
        if integer("BlockCache", "block_size", self.block_size) < 1:
            raise ValueError(f"BlockCache: block_size must be at least 1, got {self.block_size}")
        if self.mode not in ("dual", "prefix"):
            raise ValueError(f"BlockCache: mode must be 'dual' or 'prefix', got {self.mode!r}")
        if self.threshold is not None and self.steps is not None:
            raise ValueError("BlockCache: threshold or steps must be given, not both")
        if self.threshold is not None and not 0 <= number("BlockCache", "threshold", self.threshold) < 1:
            raise ValueError(f"BlockCache: threshold must be in [0, 1), got {self.threshold}")
        if self.steps is not None and not 1 <= integer("BlockCache", "steps", self.steps) <= self.block_size:
            raise ValueError(f"BlockCache: steps must be in [1, {self.block_size}], got {self.steps}")
        if self.refresh is not None and integer("BlockCache", "refresh", self.refresh) < 1:
            raise ValueError(f"BlockCache: refresh must be at least 1, got {self.refresh}")

    def counts(self, size: int) -> list[int]:
        """Tokens that each step of a block of `size` decodes."""
        steps = min(size, self.steps or size)
        return [size // steps + (i < size % steps) for i in range(steps)]

    def is_full(self, step: int) -> bool:
        """Whether step `step` of a block forwards all tokens."""
        return step == 0 or (self.refresh is not None and step % self.refresh == 0)

    def evaluations(self, num_tokens: int, prefix: int = 0, given: int = 0) -> tuple[int, int]:
        """Positions forwarded per row, the first `given` tokens known, and by as many full steps.

        sum over blocks of full steps * (N + P) + local steps * (M + P);   steps * (N + P)

        with M the tokens of the block, in the mode "prefix" those from its start to the end.

        Raises:
            ValueError: a threshold, which takes as many steps as it takes.
        """
        if self.threshold is not None:
            raise ValueError("BlockCache.evaluations: threshold must be None, as steps depend on the tokens")
        own = steps = 0
        for start in range(0, num_tokens, self.block_size):
            stop = min(start + self.block_size, num_tokens)
            last = num_tokens if self.mode == "prefix" else stop
            left = stop - max(start, min(given, stop))
            for step, count in enumerate(self.counts(stop - start)):
                if left <= 0:
                    break
                own += prefix + (num_tokens if self.is_full(step) else last - start)
                left, steps = left - count, steps + 1
        return own, steps * (num_tokens + prefix)


def token_evaluations(reuse: FullOnly | ReCAP, counts: Sequence[int], prefix: int = 0) -> tuple[int, int]:
    """Positions forwarded by a generation, and by one with as many full steps.

    sum over groups of (N + P) + local steps * (sum of the group's counts + P);   T (N + P)
    """
    tokens = sum(counts)
    groups = reuse.groups(counts)
    own = sum(tokens + prefix + (len(group) - 1) * (sum(group) + prefix) for group in groups)
    return own, len(counts) * (tokens + prefix)
