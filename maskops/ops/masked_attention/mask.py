"""AttentionMask: which keys each query sees, as data; and BlockMap, what the kernels read of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from maskops._backends import find_op
from maskops._checks import check_is_tensor, describe, fail, integer
from maskops.ops.masked_attention import program as rules
from maskops.ops.nm_matmul.bitmask import pack_bitmask
from maskops.reference.masked_attention import EMPTY, FULL, TILE, dense_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASS = "AttentionMask"
INTEGERS = (torch.int32, torch.int64)


class BlockMap(NamedTuple):
    """A mask compiled for some lengths.  Made by AttentionMask.compile; layers share it.

    Attributes:
        tiles: int32 [B or 1, H or 1, ceil(Lq / 64), ceil(Lk / 64)], per tile of 64 queries x 64 keys -1 where no query sees a key,
            -2 where all see all, else the row of `words` with the tile's bits.
        words: int64 [P, 64], per partial tile and query 64 bits, bit j for key j of the tile.
        Lq, Lk: the lengths.
    """

    tiles: Tensor
    words: Tensor
    Lq: int
    Lk: int

    def dense(self) -> Tensor:
        """bool [B or 1, H or 1, Lq, Lk]."""
        return dense_mask(self.tiles, self.words, self.Lq, self.Lk)


class AttentionMask:
    """Which keys each query of an attention sees: rules that are combined with &, | and ~ and turned into tiles by one kernel.

    Immutable; a pytree of two tensors. Batch and heads of size 1 stand for any. Lengths that no rule fixes are those of the call.
    """

    def __init__(
        self, ints: Tensor, bytes: Tensor, program: tuple[int, ...], batch: int = 1, heads: int = 1,
        Lq: int | None = None, Lk: int | None = None,
    ) -> None:  # fmt: skip
        """Use the constructors below; this one takes a program (ops/masked_attention/program.py) and its data as they are."""
        self.ints, self.bytes, self.program = ints, bytes, program
        self.batch, self.heads, self.Lq, self.Lk = batch, heads, Lq, Lk
        self._maps: dict[tuple, BlockMap] = {}

    # ---- rules

    @classmethod
    def dense(cls, mask: Tensor) -> AttentionMask:
        """True where a query sees a key.  mask: bool [Lq, Lk] or [B or 1, H or 1, Lq, Lk]."""
        _check(mask, "dense", "mask", (torch.bool,), "bool [Lq, Lk] or [B, H, Lq, Lk]", (2, 4))
        mask = mask[None, None] if mask.dim() == 2 else mask
        return _of_bits(mask, 1, 1, mask.shape[2], mask.shape[3])

    @classmethod
    def key_padding(cls, keys: Tensor) -> AttentionMask:
        """Keys that are real.  keys: lengths, int [B]; or bool [B, Lk], True for a real key."""
        if isinstance(keys, Tensor) and keys.dtype == torch.bool:
            return cls.keys(keys)
        _check(keys, "key_padding", "keys", INTEGERS, "int [B] or bool [B, Lk]", (1,))
        return _of_lengths(keys)

    @classmethod
    def packed(
        cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *, total_q: int | None = None, total_k: int | None = None
    ) -> AttentionMask:  # fmt: skip
        """Sequences packed one after the other: each sees its own.

        cu_seqlens_q, cu_seqlens_k: int [sequences + 1], cumulative lengths from 0 on; keys default to the queries.
        total_q, total_k: their last entries, so that nothing waits for a GPU; positions behind the last sequence see nothing.
        """
        _check(cu_seqlens_q, "packed", "cu_seqlens_q", INTEGERS, "int [sequences + 1]", (1,))
        keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check(keys, "packed", "cu_seqlens_k", INTEGERS, "int [sequences + 1]", (1,))
        if cu_seqlens_q.shape != keys.shape:
            fail(f"{CLASS}.packed", "cu_seqlens_k", f"have shape {list(cu_seqlens_q.shape)}", describe(keys))
        total_q = int(cu_seqlens_q[-1]) if total_q is None else total_q
        total_k = (total_q if cu_seqlens_k is None else int(keys[-1])) if total_k is None else total_k
        q, k = _document(cu_seqlens_q, total_q, -1), _document(keys, total_k, -2)
        return cls.segments(q, k)

    @classmethod
    def causal(cls, offset: int = 0) -> AttentionMask:
        """k <= q + offset. The last query of a cache of Lk keys sees all of them with offset = Lk - Lq."""
        return _of_rule(rules.BAND, low=-rules.FAR, high=integer(f"{CLASS}.causal", "offset", offset))

    @classmethod
    def window(cls, left: int, right: int) -> AttentionMask:
        """q - left <= k <= q + right."""
        left, right = (integer(f"{CLASS}.window", n, v) for n, v in (("left", left), ("right", right)))
        if left < 0 or right < 0:
            fail(f"{CLASS}.window", "left and right", "be at least 0", f"{left} and {right}")
        return _of_rule(rules.BAND, low=-left, high=right)

    @classmethod
    def prefix(cls, lengths: Tensor) -> AttentionMask:
        """Causal, but the first keys are seen by every query.  lengths: int [B]."""
        _check(lengths, "prefix", "lengths", INTEGERS, "int [B]", (1,))
        return _of_lengths(lengths) | cls.causal()

    @classmethod
    def block_causal(cls, block: int) -> AttentionMask:
        """k / block <= q / block: causal between blocks, everything inside one (block diffusion)."""
        if integer(f"{CLASS}.block_causal", "block", block) < 1:
            fail(f"{CLASS}.block_causal", "block", "be positive", block)
        return _of_rule(rules.BLOCK_CAUSAL, block=block)

    @classmethod
    def intervals(cls, start: Tensor, end: Tensor) -> AttentionMask:
        """Key k is seen by the queries start[k] <= q < end[k].  start, end: int [Lk] or [B or 1, H or 1, Lk] (FlashMask's form)."""
        return _of_ranges(rules.KEY_RANGE, "intervals", start, end)

    @classmethod
    def query_intervals(cls, start: Tensor, end: Tensor) -> AttentionMask:
        """Query q sees the keys start[q] <= k < end[q].  start, end: int [Lq] or [B or 1, H or 1, Lq]."""
        return _of_ranges(rules.ROW_RANGE, "query_intervals", start, end)

    @classmethod
    def segments(cls, ids_q: Tensor, ids_k: Tensor | None = None) -> AttentionMask:
        """A query sees the keys of its own id (documents, in any order).  ids_q: int [Lq] or [B or 1, Lq]; ids_k likewise."""
        q, k = _ids("segments", "ids_q", ids_q), _ids("segments", "ids_k", ids_q if ids_k is None else ids_k)
        return _of_ids(rules.SAME, q, k)

    @classmethod
    def groups(cls, matrix: Tensor, group_of_q: Tensor, group_of_k: Tensor | None = None) -> AttentionMask:
        """matrix[group of q, group of k].  matrix: bool [G, G]; groups: int [L] or [B or 1, L], in [0, G)."""
        _check(matrix, "groups", "matrix", (torch.bool,), "bool [G, G]", (2,))
        if matrix.shape[0] != matrix.shape[1]:
            fail(f"{CLASS}.groups", "matrix", "be square", describe(matrix))
        q = _ids("groups", "group_of_q", group_of_q)
        k = _ids("groups", "group_of_k", group_of_q if group_of_k is None else group_of_k)
        for name, ids in (("group_of_q", q), ("group_of_k", k)):
            if ids.device.type == "cpu" and ids.numel() and not (ids.min() >= 0 and ids.max() < len(matrix)):
                raise IndexError(
                    f"{CLASS}.groups: {name} must be in [0, {len(matrix)}), got {int(ids.min())} to {int(ids.max())}"
                )
        mask = _of_ids(rules.GROUPS, q, k, matrix=0, groups=matrix.shape[0])
        return AttentionMask(
            mask.ints, matrix.reshape(-1).to(torch.uint8), mask.program, mask.batch, 1, mask.Lq, mask.Lk
        )

    @classmethod
    def keys(cls, keys: Tensor, Lk: int | None = None) -> AttentionMask:
        """Every query sees these keys only.  keys: bool [B or 1, Lk]; or ids, int [B or 1, K], with Lk; -1 is an empty slot."""
        _check(keys, "keys", "keys", (torch.bool, *INTEGERS), "bool [B, Lk] or int [B, K]", (2,))
        if keys.dtype != torch.bool:
            if Lk is None:
                fail(f"{CLASS}.keys", "Lk", "be given with ids", None)
            seen = torch.zeros(keys.shape[0], Lk + 1, dtype=torch.bool, device=keys.device)
            keys = seen.scatter(1, torch.where(keys < 0, Lk, keys.long()), True)[:, :Lk]
        return _of_bits(keys[:, None, None], 1, 1, None, keys.shape[1])

    @classmethod
    def hide_self(cls) -> AttentionMask:
        """k != q."""
        return ~cls.window(0, 0)

    @classmethod
    def from_block_map(cls, blocks: Tensor, q_block: int, k_block: int) -> AttentionMask:
        """Blocks of q_block queries x k_block keys that see each other.  blocks: bool [nq, nk] or [B or 1, H or 1, nq, nk]."""
        _check(blocks, "from_block_map", "blocks", (torch.bool,), "bool [nq, nk] or [B, H, nq, nk]", (2, 4))
        for name, size in (("q_block", q_block), ("k_block", k_block)):
            if integer(f"{CLASS}.from_block_map", name, size) < 1:
                fail(f"{CLASS}.from_block_map", name, "be positive", size)
        blocks = blocks[None, None] if blocks.dim() == 2 else blocks
        return _of_bits(blocks, q_block, k_block, None, None)

    # ---- combinations

    def __and__(self, other: AttentionMask) -> AttentionMask:
        return self._join(other, rules.AND)

    def __or__(self, other: AttentionMask) -> AttentionMask:
        return self._join(other, rules.OR)

    def __invert__(self) -> AttentionMask:
        program = self.program + rules.instruction(rules.NOT)
        return AttentionMask(self.ints, self.bytes, program, self.batch, self.heads, self.Lq, self.Lk)

    def _join(self, other: AttentionMask, code: int) -> AttentionMask:
        if not isinstance(other, AttentionMask):
            return NotImplemented
        sizes = [_same(name, getattr(self, name), getattr(other, name)) for name in ("batch", "heads", "Lq", "Lk")]
        ints, bytes = (_put_together(getattr(self, n), getattr(other, n)) for n in ("ints", "bytes"))
        moved = rules.moved(other.program, self.ints.numel(), self.bytes.numel())
        program = rules.joined(self.program, moved, code)
        if rules.depth(program) > rules.DEPTH:
            fail(
                CLASS,
                "a combination",
                f"need at most {rules.DEPTH} values at once; join some into a dense mask first",
                rules.depth(program),
            )
        return AttentionMask(ints, bytes, program, *sizes)

    # ---- what it becomes

    def to(self, device: torch.device | str) -> AttentionMask:
        return self._with(self.ints.to(device), self.bytes.to(device))

    @property
    def device(self) -> torch.device:
        return self.ints.device

    def compile(self, Lq: int | None = None, Lk: int | None = None, *, backend: str = "auto") -> BlockMap:
        """The tiles of this mask for Lq queries and Lk keys; remembered, so that layers share them."""
        Lq, Lk = (_length(name, own, given) for name, own, given in (("Lq", self.Lq, Lq), ("Lk", self.Lk, Lk)))
        remembered = not torch.compiler.is_compiling()
        if remembered and (Lq, Lk, backend) in self._maps:
            return self._maps[Lq, Lk, backend]
        op = find_op("masked_attention_map", self.ints.device.type, backend)
        found = BlockMap(*op(self.ints, self.bytes, list(self.program), self.batch, self.heads, Lq, Lk), Lq, Lk)
        if remembered:
            self._maps[Lq, Lk, backend] = found
        return found

    def to_dense(self, Lq: int | None = None, Lk: int | None = None) -> Tensor:
        """bool [B or 1, H or 1, Lq, Lk]."""
        return self.compile(Lq, Lk).dense()

    def block_map(
        self, q_block: int = TILE, k_block: int = TILE, *, Lq: int | None = None, Lk: int | None = None
    ) -> Tensor:
        """int8 [B or 1, H or 1, nq, nk]: 0 where a block is empty, 1 partial, 2 full.  Blocks are multiples of 64."""
        for name, size in (("q_block", q_block), ("k_block", k_block)):
            if size < 1 or size % TILE:
                fail(f"{CLASS}.block_map", name, f"be a positive multiple of {TILE}", size)
        tiles = self.compile(Lq, Lk).tiles
        state = torch.where(tiles == EMPTY, 0, torch.where(tiles == FULL, 2, 1)).float()
        stride = (q_block // TILE, k_block // TILE)
        most = torch.nn.functional.max_pool2d(state, stride, ceil_mode=True)
        least = -torch.nn.functional.max_pool2d(-state, stride, ceil_mode=True)
        return torch.where(most == 0, 0, torch.where(least == 2, 2, 1)).to(torch.int8)

    def density(self, Lq: int | None = None, Lk: int | None = None) -> float:
        """The share of pairs that see each other, counted by tiles."""
        found = self.compile(Lq, Lk)
        rows, columns = (_sizes_of_tiles(n, found.tiles.device) for n in (found.Lq, found.Lk))
        full = torch.where(found.tiles == FULL, rows[:, None] * columns, 0).sum()
        bits = sum(((found.words >> i) & 1).sum() for i in range(TILE))
        pairs = found.tiles.shape[0] * found.tiles.shape[1] * found.Lq * found.Lk
        return int(full + bits) / pairs if pairs else 0.0

    def plot(self, Lq: int | None = None, Lk: int | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw the mask of the first batch entry and head: what is seen, over the tiles that are computed.  Needs matplotlib."""
        from matplotlib import pyplot

        found = self.compile(Lq, Lk)
        ax = ax or pyplot.figure(figsize=(4, 4), layout="constrained").gca()
        tiles = torch.where(found.tiles[0, 0] == EMPTY, 0.0, 0.35).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        seen = found.dense()[0, 0].float()
        shown = torch.maximum(tiles[: found.Lq, : found.Lk], seen)
        ax.imshow(shown.cpu().numpy(), cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
        ax.set(
            xlabel="key",
            ylabel="query",
            title=f"{seen.mean().item():.0%} of pairs, {(found.tiles[0, 0] != EMPTY).float().mean().item():.0%} of tiles",
        )
        return ax

    def __repr__(self) -> str:
        names = {code: name.lower() for name, code in vars(rules).items() if name in rules.NAMES}
        steps = " ".join(names[code] for code, _ in rules.instructions(self.program))
        free = {"Lq": self.Lq, "Lk": self.Lk}
        sizes = ", ".join(
            [f"batch={self.batch}", f"heads={self.heads}", *(f"{n}={v}" for n, v in free.items() if v is not None)]
        )
        return f"{CLASS}({steps}; {sizes})"

    def _with(self, ints: Tensor, bytes: Tensor) -> AttentionMask:
        return AttentionMask(ints, bytes, self.program, self.batch, self.heads, self.Lq, self.Lk)


_pytree.register_pytree_node(
    AttentionMask,
    lambda mask: ([mask.ints, mask.bytes], (mask.program, mask.batch, mask.heads, mask.Lq, mask.Lk)),
    lambda tensors, rest: AttentionMask(*tensors, *rest),
    serialized_type_name="maskops.AttentionMask",
)


# ---- making rules


def _check(x: Any, constructor: str, name: str, dtypes: tuple, shape: str, ranks: tuple[int, ...]) -> None:
    function = f"{CLASS}.{constructor}"
    check_is_tensor(function, name, x)
    if x.dtype not in dtypes or x.dim() not in ranks:
        fail(function, name, f"be {shape}", describe(x))


def _none(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def _of_rule(code: int, **operands: int) -> AttentionMask:
    cpu = torch.device("cpu")
    return AttentionMask(_none(cpu, torch.int32), _none(cpu, torch.uint8), rules.instruction(code, **operands))


def _of_bits(values: Tensor, q_block: int, k_block: int, Lq: int | None, Lk: int | None) -> AttentionMask:
    """values: bool [B, H, queries or 1, keys], one per block."""
    B, H, rows = values.shape[:3]
    packed = pack_bitmask(values)
    width = packed.shape[3]
    strides = (H * rows * width * (B > 1), rows * width * (H > 1), width * (rows > 1))
    rule = rules.instruction(
        rules.BITS,
        at=0,
        stride_b=strides[0],
        stride_h=strides[1],
        stride_q=strides[2],
        q_block=q_block,
        k_block=k_block,
    )
    return AttentionMask(_none(values.device, torch.int32), packed.view(-1), rule, B, H, Lq, Lk)


def _sizes_of_tiles(length: int, device: torch.device) -> Tensor:
    """int64 [tiles], TILE each but what is left in the last one."""
    return (length - torch.arange(0, length, TILE, device=device)).clamp(max=TILE)


def _of_lengths(lengths: Tensor) -> AttentionMask:
    rule = rules.instruction(rules.LENGTH, at=0, stride_b=int(len(lengths) > 1), stride_h=0)
    return AttentionMask(lengths.to(torch.int32).contiguous(), _none(lengths.device, torch.uint8), rule, len(lengths))


def _of_ranges(code: int, constructor: str, start: Tensor, end: Tensor) -> AttentionMask:
    for name, x in (("start", start), ("end", end)):
        _check(x, constructor, name, INTEGERS, "int [L] or [B, H, L]", (1, 3))
    if start.shape != end.shape:
        fail(f"{CLASS}.{constructor}", "end", f"have shape {list(start.shape)}", describe(end))
    B, H, L = start.shape if start.dim() == 3 else (1, 1, len(start))
    data = torch.cat([start.reshape(-1), end.reshape(-1)]).to(torch.int32)
    rule = rules.instruction(code, start=0, end=B * H * L, stride_b=H * L * (B > 1), stride_h=L * (H > 1))
    sizes = (L, None) if code == rules.ROW_RANGE else (None, L)
    return AttentionMask(data, _none(start.device, torch.uint8), rule, B, H, *sizes)


def _ids(constructor: str, name: str, ids: Tensor) -> Tensor:
    _check(ids, constructor, name, INTEGERS, "int [L] or [B, L]", (1, 2))
    return ids[None] if ids.dim() == 1 else ids


def _of_ids(code: int, q: Tensor, k: Tensor, **operands: int) -> AttentionMask:
    batch = _same("batch", q.shape[0], k.shape[0])
    Lq, Lk = q.shape[1], k.shape[1]
    rule = rules.instruction(
        code, q_at=0, k_at=q.numel(), q_stride_b=Lq * (q.shape[0] > 1), k_stride_b=Lk * (k.shape[0] > 1), **operands
    )
    data = torch.cat([q.reshape(-1), k.reshape(-1)]).to(torch.int32)
    return AttentionMask(data, _none(q.device, torch.uint8), rule, batch, 1, Lq, Lk)


def _document(cu_seqlens: Tensor, total: int, behind: int) -> Tensor:
    """int [total]: the sequence of each position, `behind` past the last one."""
    places = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    found = torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
    return torch.where(places < cu_seqlens[-1], found, behind)


def _same(name: str, a: int | None, b: int | None) -> int | None:
    """The size that both have; None, and for batch and heads 1, goes with any."""
    free = (None, 1) if name in ("batch", "heads") else (None,)
    if a in free:
        return b if b is not None else a
    if b in free or a == b:
        return a
    fail(CLASS, name, f"be {a} in both masks", b)


def _put_together(a: Tensor, b: Tensor) -> Tensor:
    """One after the other; rules without data follow the device of those with."""
    device = a.device if a.numel() else b.device
    return torch.cat([a.to(device), b.to(device)])


def _length(name: str, own: int | None, given: int | None) -> int:
    if own is not None and given is not None and own != given:
        fail(CLASS, name, f"be {own}, the length of its tensors", given)
    if own is None and given is None:
        fail(CLASS, name, "be given: no rule of this mask fixes it", None)
    return own if given is None else given
