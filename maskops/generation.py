"""Masked generation with feature reuse, over any model that lets its attention be called from outside.

B rows, N tokens, P prefix positions (a class token), U local tokens, V vocabulary. A step forwards either all tokens, and may leave
keys and values in a ContextCache, or a few local ones, which read the others from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from maskops._checks import check_is_tensor, check_tensor, check_values, fail, integer, integers, number
from maskops.ops.feature_reuse import ContextCache, Selection, cached_attention, confidence_select
from maskops.ops.masked_attention import masked_attention
from maskops.reuse import BlockCache, FullOnly, ReCAP, token_evaluations

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class MaskedModel(Protocol):
    """What MaskedGenerator needs of a model.

    Attributes:
        num_tokens: N.
        prefix: P, positions in front of the tokens that are computed in every step.
        num_layers, heads, head_dim: of its attention.
        null_condition: the condition of guidance's second branch; needed for guidance only.

    logits(tokens, ids, condition, attend) -> [B, U, V]:
        tokens int64 [B, U], -1 where masked; ids int64 [B, U], which tokens they are, or None for all; condition int64 [B] or
        None. Layer i calls attend(i, q, k, v), each [B, H, P + U, D], prefix first, where it would attend.
    """

    num_tokens: int
    prefix: int
    num_layers: int
    heads: int
    head_dim: int

    def logits(self, tokens: Tensor, ids: Tensor | None, condition: Tensor | None, attend: Attend) -> Tensor: ...


def attend_to_all(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The `attend` of a forward pass without a cache."""
    return masked_attention(q, k, v)


# ---------------------------------------------------------------- one generation


@dataclass
class Step:
    """A line of the trace: kind "full" or "local", positions forwarded and tokens decoded per row (None: differs), host seconds."""

    kind: str
    positions: int
    decoded: int | None
    seconds: float


@dataclass
class Generation:
    """tokens int64 [B, N] and what each step did."""

    tokens: Tensor
    trace: list[Step] = field(default_factory=list)

    @property
    def positions(self) -> int:
        """Token evaluations of a row."""
        return sum(step.positions for step in self.trace)


class MaskedGenerator:
    """Generate tokens step by step with a MaskedModel.

    Args:
        model: a MaskedModel.
        schedule: tokens that each step decodes, see mask_schedule; None with BlockCache.
        reuse: FullOnly(), ReCAP(pre_full, local_steps) or BlockCache(...).
        temperature: of the Gumbel noise in the choice, falling to 0 with the groups.
        sample_temperature: of the sampled tokens; 0 takes the likeliest.
        guidance: w of (1 + w) conditional - w unconditional logits, one number or one per step; both branches are cached.

    Example:
        >>> from maskops.models.maskgit import MaskGIT, MaskGITConfig
        >>> model = MaskGIT(MaskGITConfig(grid=(4, 4), vocab=8, dim=32, depth=2, heads=2))
        >>> generator = MaskedGenerator(model, maskops.mask_schedule("cosine", 8, 16), ReCAP(pre_full=0, local_steps=1))
        >>> generator.generate(2, seed=0).tokens.shape
        torch.Size([2, 16])
        >>> print(generator.explain().splitlines()[0])
        8 steps: 4 full and 4 local; 88 of 136 token evaluations of 8 full steps (65%)
    """

    def __init__(
        self, model: MaskedModel, schedule: Sequence[int] | None, reuse: FullOnly | ReCAP | BlockCache | None = None, *,
        temperature: float = 4.5, sample_temperature: float = 1.0, guidance: float | Sequence[float] = 0.0,
    ) -> None:  # fmt: skip
        name, self.model = "MaskedGenerator", model
        missing = [
            part for part in ("num_tokens", "prefix", "num_layers", "logits", "parameters") if not hasattr(model, part)
        ]
        if missing:
            raise TypeError(
                f"{name}: model must be a MaskedModel, got {type(model).__name__} without {', '.join(missing)}"
            )
        self.reuse = FullOnly() if reuse is None else reuse
        if not isinstance(self.reuse, FullOnly | ReCAP | BlockCache):
            raise TypeError(f"{name}: reuse must be FullOnly, ReCAP or BlockCache, got {type(reuse).__name__}")
        if (schedule is None) != isinstance(self.reuse, BlockCache):
            raise ValueError("MaskedGenerator: schedule must be given, except with BlockCache")
        self.counts = [] if schedule is None else integers(name, "schedule", schedule)
        if schedule is not None and min(self.counts, default=0) < 0:
            raise ValueError(f"MaskedGenerator: schedule must hold counts of at least 0, got {self.counts}")
        if isinstance(guidance, Sequence) and not isinstance(guidance, str):
            guidance = [self._finite("guidance", w) for w in guidance]
            if len(guidance) != len(self.counts):
                raise ValueError(f"{name}: guidance must be one number or {len(self.counts)}, got {len(guidance)}")
        else:
            guidance = self._finite("guidance", guidance)
        self.guidance = guidance
        self.temperature = self._finite("temperature", temperature, 0)
        self.sample_temperature = self._finite("sample_temperature", sample_temperature, 0)

    @staticmethod
    def _finite(argument: str, value: float, least: float = -math.inf) -> float:
        found = number("MaskedGenerator", argument, value)
        if not (math.isfinite(found) and found >= least):
            expected = "be finite" if least == -math.inf else f"be finite and at least {least}"
            fail("MaskedGenerator", argument, expected, found)
        return found

    @torch.no_grad()
    def generate(
        self, batch: int | None = None, condition: Tensor | None = None, *, tokens: Tensor | None = None, seed: int = 0,
        first_row: int = 0, progress: bool = False,
    ) -> Generation:  # fmt: skip
        """Fill masked tokens.

        Args:
            batch: B rows, all of them masked; or give tokens.
            condition: int64 [B], e.g. classes.
            tokens: int64 [B, N] to complete, -1 where masked, as many in each row as the schedule decodes.
            seed, first_row: row b draws as row first_row + b of a larger batch with this seed does.
            progress: draw a progress bar (needs rich).

        Raises:
            ValueError: neither or both of batch and tokens, a wrong shape or dtype, a schedule that decodes another number,
                guidance without a condition.  TypeError: an argument of another type.
        """
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        if (batch is None) == (tokens is None):
            raise ValueError("generate: batch or tokens must be given, one of them")
        seed, first_row = integer("generate", "seed", seed), integer("generate", "first_row", first_row)
        if tokens is None:
            if integer("generate", "batch", batch) < 0:
                raise ValueError(f"generate: batch must be at least 0, got {batch}")
            tokens = torch.full((batch, self.model.num_tokens), -1, dtype=torch.int64, device=device)
        check_is_tensor("generate", "tokens", tokens)
        like = torch.empty(0, device=device)
        check_tensor("generate", "tokens", tokens, "[B, N]", (torch.int64,), (None, self.model.num_tokens), like)
        check_values("generate", "tokens", tokens >= -1, "be at least -1, which is a masked one", tokens)
        if condition is not None:
            check_is_tensor("generate", "condition", condition)
            check_tensor("generate", "condition", condition, "[B]", (torch.int64,), (len(tokens),), like)
            last = getattr(self.model, "null_condition", None)
            if last is not None:
                inside = (condition >= 0) & (condition <= last)
                check_values("generate", "condition", inside, f"be in [0, {last}] for this model", condition)
        guided = any(self.guidance) if isinstance(self.guidance, list) else self.guidance != 0
        if guided and condition is None:
            raise ValueError("generate: condition must be given with guidance, got None")
        run = _Run(self, tokens.clone(), condition, seed, first_row)
        if isinstance(self.reuse, BlockCache):
            run.blocks(self.reuse, progress)
        else:
            run.groups(self.reuse.groups(self.counts), progress)
        return Generation(run.tokens, run.trace)

    def explain(self, generation: Generation | None = None) -> str:
        """What the steps are and what they save; of a finished generation also how long each took."""
        if isinstance(self.reuse, BlockCache):
            lines = [self._explain_blocks(self.reuse)]
        else:
            own, full = token_evaluations(self.reuse, self.counts, self.model.prefix)
            fulls, steps = len(self.reuse.groups(self.counts)), len(self.counts)
            share = own / full if full else 1.0
            lines = [
                f"{steps} steps: {fulls} full and {steps - fulls} local;"
                f" {own} of {full} token evaluations of {steps} full steps ({share:.0%})"
            ]
        for i, step in enumerate([] if generation is None else generation.trace):
            decoded = "some" if step.decoded is None else step.decoded
            lines.append(
                f"{i:4} {step.kind:5} {step.positions:6} positions {decoded:>5} decoded {1e3 * step.seconds:9.2f} ms"
            )
        return "\n".join(lines)

    def _explain_blocks(self, reuse: BlockCache) -> str:
        again = "" if reuse.refresh is None else f", again every {reuse.refresh} steps"
        line = f"blocks of {reuse.block_size}, {reuse.mode} cache: a full step{again}, and local ones per block"
        if reuse.threshold is not None:
            return f"{line}, until all are sure"
        own, full = reuse.evaluations(self.model.num_tokens, self.model.prefix)
        share = own / full if full else 1.0
        return f"{line}; {own} of {full} token evaluations of as many full steps ({share:.0%})"


class _Run:
    """The state of one generation."""

    def __init__(
        self, generator: MaskedGenerator, tokens: Tensor, condition: Tensor | None, seed: int, first_row: int
    ) -> None:
        self.generator, self.model = generator, generator.model
        self.tokens, self.known = tokens, tokens >= 0
        self.condition, self.seed, self.first_row = condition, seed, first_row
        self.trace: list[Step] = []
        self.cache: ContextCache | None = None
        self.guided = condition is not None and generator.guidance != 0 and bool(generator.guidance)

    # ------------------------------------------------------------ schedules

    def groups(self, groups: list[list[int]], progress: bool) -> None:
        """Each group: a full step that chooses the tokens of the group, then local steps over them."""
        left, decoded = (~self.known).sum(1).tolist(), sum(map(sum, groups))
        for row, masked in enumerate(left):
            if masked != decoded:
                raise ValueError(
                    f"generate: schedule must decode the {masked} masked tokens of row {row}, got {decoded}"
                )
        total = sum(map(len, groups))
        with _Bar(total, progress) as bar:
            for g, counts in enumerate(groups):
                began = time.perf_counter()
                logits = self.forward(None, store=len(counts) > 1)
                noise = self.generator.temperature * (1 - (g + 1) / len(groups))
                found = self.select(logits, self.known, sum(counts), noise)
                local, done = found.ids.contiguous(), counts[0]
                self.decode(local[:, :done], found.tokens.gather(1, local[:, :done]))
                self.note("full", self.model.num_tokens, counts[0], began, bar)
                for count in counts[1:]:
                    began = time.perf_counter()
                    logits = self.forward(local)
                    drawn = self.select(logits, self.known.gather(1, local), 0, 0.0).tokens
                    self.decode(local[:, done : done + count], drawn[:, done : done + count])
                    done += count
                    self.note("local", local.shape[1], count, began, bar)

    def blocks(self, reuse: BlockCache, progress: bool) -> None:
        """Each block: a full step fills the cache and decodes some, then local steps until the block is done in all rows."""
        N = self.model.num_tokens
        with _Bar(N, progress) as bar:
            for start in range(0, N, reuse.block_size):
                stop = min(start + reuse.block_size, N)
                last = N if reuse.mode == "prefix" else stop
                local = torch.arange(start, last, device=self.tokens.device).expand(len(self.tokens), -1).contiguous()
                inside = local < stop
                plan = reuse.counts(stop - start)
                # Every step decodes at least one token of each row, so there are no more steps than tokens.
                for step in range(stop - start):
                    # The one look at the device of a step: with a threshold nobody knows how many steps a block takes.
                    if bool(self.known[:, start:stop].all()):
                        break
                    began = time.perf_counter()
                    full = reuse.is_full(step)
                    logits = self.forward(None, store=True)[:, start:last] if full else self.forward(local)
                    count = None if reuse.threshold is not None else plan[min(step, len(plan) - 1)]
                    # Rows need different numbers of steps, so the draw goes by the place and not by the steps so far.
                    found = self.select(
                        logits, self.known[:, start:last] | ~inside, count, 0.0, reuse.threshold, start + step
                    )
                    self.decode(torch.where(found.ids < 0, -1, found.ids + start), None, found.tokens, start)
                    self.note("full" if full else "local", N if full else local.shape[1], count, began, bar)
                if not bool(self.known[:, start:stop].all()):
                    raise ValueError(f"generate: logits of tokens {start} to {stop - 1} must be finite, got NaN or inf")

    # ------------------------------------------------------------ parts of a step

    def select(
        self, logits: Tensor, known: Tensor, count: int | None, noise: float, threshold: float | None = None,
        draw: int | None = None,
    ) -> Selection:  # fmt: skip
        """draw: which draw of the seed, by default the number of steps so far."""
        step = torch.tensor([self.seed, len(self.trace) if draw is None else draw], device=logits.device)
        return confidence_select(
            logits, known, count, temperature=noise, seed=step, sample_temperature=self.generator.sample_temperature,
            threshold=threshold, first_row=self.first_row,
        )  # fmt: skip

    def decode(self, ids: Tensor, drawn: Tensor | None, table: Tensor | None = None, start: int = 0) -> None:
        """Set tokens ids [B, K] (-1: none) to drawn [B, K], or to those of table, which holds tokens from `start` on."""
        empty = ids < 0
        at = ids.clamp(min=0)
        if drawn is None:
            drawn = table.gather(1, (at - start).clamp(min=0))
        # An empty slot goes to a column more, which is cut off.
        at = torch.where(empty, self.tokens.shape[1], at)
        wide = torch.nn.functional.pad(self.tokens, (0, 1)).scatter(1, at, drawn)
        self.tokens = wide[:, :-1].contiguous()
        self.known = self.tokens >= 0

    def forward(self, local: Tensor | None, store: bool = False) -> Tensor:
        """Logits of all tokens (local None), kept in the cache where store, or of the local ones."""
        tokens = self.tokens if local is None else self.tokens.gather(1, local)
        condition, ids = self.condition, local
        if self.guided:
            condition = torch.cat([condition, torch.full_like(condition, self.model.null_condition)])
            tokens, ids = (None if x is None else torch.cat([x, x]) for x in (tokens, ids))
        attend = attend_to_all
        if local is not None:
            attend = self.local_attention(ids)
        elif store:
            attend = self.storing_attention
        logits = self.model.logits(tokens, ids, condition, attend)
        if not self.guided:
            return logits
        weight = self.generator.guidance
        weight = weight if isinstance(weight, int | float) else weight[len(self.trace)]
        conditional, free = logits.chunk(2)
        return (1 + weight) * conditional - weight * free

    def storing_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cache is None:
            B, H, L, D = k.shape
            self.cache = ContextCache(self.model.num_layers, B, L, H, D, k.dtype, k.device)
        self.cache.write_(layer, k, v)
        return masked_attention(q, k, v)

    def local_attention(self, local: Tensor) -> Attend:
        prefix = torch.arange(self.model.prefix, device=local.device).expand(len(local), -1)
        ids = torch.cat([prefix, local + self.model.prefix], 1)
        view = self.cache.exclude(ids)
        return lambda layer, q, k, v: cached_attention(q, k, v, self.cache, layer, ids, exclude=view)

    def note(self, kind: str, positions: int, decoded: int | None, began: float, bar: _Bar) -> None:
        step = Step(kind, positions + self.model.prefix, decoded, time.perf_counter() - began)
        self.trace.append(step)
        bar.update(step)


class _Bar:
    """A progress bar of rich, or nothing."""

    def __init__(self, total: int, shown: bool) -> None:
        self.total, self.shown, self.bar = total, shown, None

    def __enter__(self) -> _Bar:
        if self.shown:
            from rich.progress import Progress

            self.bar = Progress()
            self.task = self.bar.add_task("generate", total=self.total)
            self.bar.start()
        return self

    def update(self, step: Step) -> None:
        if self.bar is not None:
            self.bar.update(self.task, advance=1, description=f"generate ({step.kind}, {step.positions} positions)")

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
