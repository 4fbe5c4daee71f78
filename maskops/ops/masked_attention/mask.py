"""AttentionMask: which keys each query sees, as data; and BlockMap, what the kernels read of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from maskops._backends import find_op
from maskops._checks import describe, fail, integer
from maskops.ops.masked_attention import checks, views
from maskops.ops.masked_attention import program as rules
from maskops.ops.masked_attention.checks import CLASS, INTEGERS, check
from maskops.ops.nm_matmul.bitmask import pack_bitmask
from maskops.reference.masked_attention import TILE, dense_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        Lq: int | None = None, Lk: int | None = None, most_q: int | None = None, most_k: int | None = None,
    ) -> None:  # fmt: skip
        """Use the constructors below; this one takes a program (ops/masked_attention/program.py) and its data as they are."""
        self.ints, self.bytes, self.program = ints, bytes, program
        self.batch, self.heads, self.Lq, self.Lk = batch, heads, Lq, Lk
        self.most_q, self.most_k = most_q, most_k  # the longest lengths that blocks of tokens cover; None: any
        self._maps: dict[tuple, BlockMap] = {}

    # ---- rules

    @classmethod
    def dense(cls, mask: Tensor) -> AttentionMask:
        """True where a query sees a key.  mask: bool [Lq, Lk] or [B or 1, H or 1, Lq, Lk]."""
        check(mask, "dense", "mask", (torch.bool,), "bool [Lq, Lk] or [B, H, Lq, Lk]", (2, 4))
        mask = mask[None, None] if mask.dim() == 2 else mask
        return _of_bits(mask, 1, 1, mask.shape[2], mask.shape[3])

    @classmethod
    def key_padding(cls, keys: Tensor) -> AttentionMask:
        """Keys that are real.  keys: lengths, int [B]; or bool [B, Lk], True for a real key."""
        if isinstance(keys, Tensor) and keys.dtype == torch.bool:
            return cls.keys(keys)
        check(keys, "key_padding", "keys", INTEGERS, "int [B] or bool [B, Lk] (attention_mask.bool())", (1,))
        return _of_lengths(keys)

    @classmethod
    def packed(
        cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *, total_q: int | None = None, total_k: int | None = None
    ) -> AttentionMask:  # fmt: skip
        """Sequences packed one after the other: each sees its own.

        cu_seqlens_q, cu_seqlens_k: int [sequences + 1], cumulative lengths from 0 on; keys default to the queries.
        total_q, total_k: their last entries, so that nothing waits for a GPU; positions behind the last sequence see nothing.
        """
        checks.check_cumulative("cu_seqlens_q", cu_seqlens_q)
        keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        if cu_seqlens_k is not None:
            checks.check_cumulative("cu_seqlens_k", keys)
            checks.check_same_device("packed", cu_seqlens_q, "cu_seqlens_k", keys)
        if cu_seqlens_q.shape != keys.shape:
            fail(f"{CLASS}.packed", "cu_seqlens_k", f"have shape {list(cu_seqlens_q.shape)}", describe(keys))
        total_q = checks.total("total_q", total_q, "cu_seqlens_q", cu_seqlens_q)
        total_k = total_q if total_k is None and cu_seqlens_k is None else total_k
        total_k = checks.total("total_k", total_k, "cu_seqlens_k", keys)
        q, k = _document(cu_seqlens_q, total_q, -1), _document(keys, total_k, -2)
        return cls.segments(q, k)

    @classmethod
    def causal(cls, offset: int = 0) -> AttentionMask:
        """k <= q + offset. The last query of a cache of Lk keys sees all of them with offset = Lk - Lq."""
        return _of_rule(rules.BAND, low=-rules.FAR, high=checks.near(integer(f"{CLASS}.causal", "offset", offset)))

    @classmethod
    def window(cls, left: int, right: int) -> AttentionMask:
        """q - left <= k <= q + right."""
        left, right = checks.size("window", "left", left), checks.size("window", "right", right)
        return _of_rule(rules.BAND, low=-checks.near(left), high=checks.near(right))

    @classmethod
    def prefix(cls, lengths: Tensor) -> AttentionMask:
        """Causal, but the first keys are seen by every query.  lengths: int [B]."""
        check(lengths, "prefix", "lengths", INTEGERS, "int [B]", (1,))
        return _of_lengths(lengths) | cls.causal()

    @classmethod
    def block_causal(cls, block: int) -> AttentionMask:
        """k / block <= q / block: causal between blocks, everything inside one (block diffusion)."""
        return _of_rule(rules.BLOCK_CAUSAL, block=checks.near(checks.size("block_causal", "block", block, 1)))

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
        q = checks.ids("segments", "ids_q", ids_q)
        k = q if ids_k is None else checks.ids("segments", "ids_k", ids_k)
        checks.check_same_device("segments", q, "ids_k", k)
        return _of_ids(rules.SAME, q, k)

    @classmethod
    def groups(cls, matrix: Tensor, group_of_q: Tensor, group_of_k: Tensor | None = None) -> AttentionMask:
        """matrix[group of q, group of k].  matrix: bool [G, G]; groups: int [L] or [B or 1, L], in [0, G)."""
        check(matrix, "groups", "matrix", (torch.bool,), "bool [G, G]", (2,))
        if matrix.shape[0] != matrix.shape[1]:
            fail(f"{CLASS}.groups", "matrix", "be square", describe(matrix))
        q = checks.ids("groups", "group_of_q", group_of_q)
        k = q if group_of_k is None else checks.ids("groups", "group_of_k", group_of_k)
        for name, ids in (("group_of_q", q), ("group_of_k", k)):
            checks.check_same_device("groups", matrix, name, ids)
            checks.check_range("groups", name, ids, 0, len(matrix))
        mask = _of_ids(rules.GROUPS, q, k, matrix=0, groups=matrix.shape[0])
        return AttentionMask(
            mask.ints, matrix.reshape(-1).to(torch.uint8), mask.program, mask.batch, 1, mask.Lq, mask.Lk
        )

    @classmethod
    def keys(cls, keys: Tensor, Lk: int | None = None) -> AttentionMask:
        """Every query sees these keys only.  keys: bool [B or 1, Lk]; or ids, int [B or 1, K], with Lk; -1 is an empty slot."""
        check(keys, "keys", "keys", (torch.bool, *INTEGERS), "bool [B, Lk] or int [B, K]", (2,))
        if Lk is not None:
            Lk = checks.size("keys", "Lk", Lk)
        if keys.dtype != torch.bool:
            if Lk is None:
                fail(f"{CLASS}.keys", "Lk", "be given with ids", None)
            checks.check_range("keys", "keys", keys, -1, Lk)
            seen = torch.zeros(keys.shape[0], Lk + 1, dtype=torch.bool, device=keys.device)
            keys = seen.scatter(1, torch.where(keys < 0, Lk, keys.long()), True)[:, :Lk]
        elif Lk is not None and Lk != keys.shape[1]:
            fail(f"{CLASS}.keys", "keys", f"have Lk = {Lk} entries in a row", describe(keys))
        return _of_bits(keys[:, None, None], 1, 1, None, keys.shape[1])

    @classmethod
    def hide_self(cls) -> AttentionMask:
        """k != q."""
        return cls.window(0, 0).complement()

    @classmethod
    def from_block_map(cls, blocks: Tensor, q_block: int, k_block: int) -> AttentionMask:
        """Blocks of q_block queries x k_block keys that see each other.  blocks: bool [nq, nk] or [B or 1, H or 1, nq, nk].

        Lengths are at most those that the blocks cover.
        """
        check(blocks, "from_block_map", "blocks", (torch.bool,), "bool [nq, nk] or [B, H, nq, nk]", (2, 4))
        q_block, k_block = (
            checks.near(checks.size("from_block_map", name, block, 1))
            for name, block in (("q_block", q_block), ("k_block", k_block))
        )
        blocks = blocks[None, None] if blocks.dim() == 2 else blocks
        return _of_bits(blocks, q_block, k_block, None, None, blocks.shape[2] * q_block, blocks.shape[3] * k_block)

    def __and__(self, other: AttentionMask) -> AttentionMask:
        return self._join(other, rules.AND)

    def __or__(self, other: AttentionMask) -> AttentionMask:
        return self._join(other, rules.OR)

    def complement(self) -> AttentionMask:
        """What the mask hides: ~mask, an operator that torch.compile(fullgraph=True) does not trace."""
        program = self.program + rules.instruction(rules.NOT)
        return AttentionMask(self.ints, self.bytes, program, *self._sizes())

    __invert__ = complement

    def _join(self, other: AttentionMask, code: int) -> AttentionMask:
        if not isinstance(other, AttentionMask):
            return NotImplemented
        sizes = [_same(name, getattr(self, name), getattr(other, name)) for name in ("batch", "heads", "Lq", "Lk")]
        sizes += [_least(self.most_q, other.most_q), _least(self.most_k, other.most_k)]
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
        if not isinstance(device, torch.device | str | int) or isinstance(device, bool):
            raise TypeError(f"{CLASS}.to: device must be a device or its name, got {device!r}")
        return AttentionMask(self.ints.to(device), self.bytes.to(device), self.program, *self._sizes())

    @property
    def device(self) -> torch.device:
        return self.ints.device

    def compile(self, Lq: int | None = None, Lk: int | None = None, *, backend: str = "auto") -> BlockMap:
        """The tiles of this mask for Lq queries and Lk keys; remembered, so that layers share them."""
        Lq, Lk = (
            _length(name, own, most, given)
            for name, own, most, given in (("Lq", self.Lq, self.most_q, Lq), ("Lk", self.Lk, self.most_k, Lk))
        )
        remembered = isinstance(backend, str) and not torch.compiler.is_compiling()
        if remembered and (Lq, Lk, backend) in self._maps:
            return self._maps[Lq, Lk, backend]
        if self.device.type == "meta":
            fail(f"{CLASS}.compile", "the mask", "hold data", "tensors on meta")
        op = find_op("masked_attention_map", self.device.type, backend, f"{CLASS}.compile")
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
        for name, block in (("q_block", q_block), ("k_block", k_block)):
            if integer(f"{CLASS}.block_map", name, block) < 1 or block % TILE:
                fail(f"{CLASS}.block_map", name, f"be a positive multiple of {TILE}", block)
        return views.block_states(self.compile(Lq, Lk).tiles, q_block, k_block)

    def density(self, Lq: int | None = None, Lk: int | None = None) -> float:
        """The share of pairs that see each other, counted by tiles."""
        return views.density(self.compile(Lq, Lk))

    def plot(self, Lq: int | None = None, Lk: int | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw the mask of the first batch entry and head: what is seen, over the tiles that are computed.  Needs matplotlib."""
        return views.plot(self.compile(Lq, Lk), ax)

    def __repr__(self) -> str:
        names = {code: name.lower() for name, code in vars(rules).items() if name in rules.NAMES}
        steps = " ".join(names[code] for code, _ in rules.instructions(self.program))
        free = {"Lq": self.Lq, "Lk": self.Lk}
        sizes = ", ".join(
            [f"batch={self.batch}", f"heads={self.heads}", *(f"{n}={v}" for n, v in free.items() if v is not None)]
        )
        return f"{CLASS}({steps}; {sizes})"

    def __reduce__(self) -> tuple:
        return AttentionMask, (self.ints, self.bytes, self.program, *self._sizes())

    def _sizes(self) -> tuple[int | None, ...]:
        return self.batch, self.heads, self.Lq, self.Lk, self.most_q, self.most_k


_pytree.register_pytree_node(
    AttentionMask,
    lambda mask: ([mask.ints, mask.bytes], (mask.program, *mask._sizes())),
    lambda tensors, rest: AttentionMask(*tensors, *rest),
    serialized_type_name="maskops.AttentionMask",
    to_dumpable_context=list,
    from_dumpable_context=lambda rest: (tuple(rest[0]), *rest[1:]),  # a file has lists for tuples
    flatten_with_keys_fn=lambda mask: (
        [(_pytree.GetAttrKey(name), getattr(mask, name)) for name in ("ints", "bytes")],
        (mask.program, *mask._sizes()),
    ),
)
# torch.load(weights_only=True) then reads saved masks; they hold tensors and ints, which are checked where they are used.
torch.serialization.add_safe_globals([AttentionMask, BlockMap])


# ---- making rules


def _none(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def _of_rule(code: int, **operands: int) -> AttentionMask:
    cpu = torch.device("cpu")
    return AttentionMask(_none(cpu, torch.int32), _none(cpu, torch.uint8), rules.instruction(code, **operands))


def _of_bits(values: Tensor, q_block: int, k_block: int, *lengths: int | None) -> AttentionMask:
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
    return AttentionMask(_none(values.device, torch.int32), packed.view(-1), rule, B, H, *lengths)


def _of_lengths(lengths: Tensor) -> AttentionMask:
    rule = rules.instruction(rules.LENGTH, at=0, stride_b=int(len(lengths) > 1), stride_h=0)
    return AttentionMask(
        checks.near_tensor(lengths).contiguous(), _none(lengths.device, torch.uint8), rule, len(lengths)
    )


def _of_ranges(code: int, constructor: str, start: Tensor, end: Tensor) -> AttentionMask:
    for name, x in (("start", start), ("end", end)):
        check(x, constructor, name, INTEGERS, "int [L] or [B, H, L]", (1, 3))
    if start.shape != end.shape:
        fail(f"{CLASS}.{constructor}", "end", f"have shape {list(start.shape)}", describe(end))
    checks.check_same_device(constructor, start, "end", end)
    B, H, L = start.shape if start.dim() == 3 else (1, 1, len(start))
    data = checks.near_tensor(torch.cat([start.reshape(-1), end.reshape(-1)]))
    rule = rules.instruction(code, start=0, end=B * H * L, stride_b=H * L * (B > 1), stride_h=L * (H > 1))
    sizes = (L, None) if code == rules.ROW_RANGE else (None, L)
    return AttentionMask(data, _none(start.device, torch.uint8), rule, B, H, *sizes)


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


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _put_together(a: Tensor, b: Tensor) -> Tensor:
    """One after the other; rules without data follow the device of those with."""
    device = a.device if a.numel() else b.device
    if (a.numel() and b.numel()) and (a.device.type == "meta") != (b.device.type == "meta"):
        fail(CLASS, "a combination", f"be of masks on {a.device}", f"one on {b.device}")
    return torch.cat([a.to(device), b.to(device)])


def _length(name: str, own: int | None, most: int | None, given: int | None) -> int:
    if given is not None:
        given = integer(CLASS, name, given)
    elif own is None:
        fail(CLASS, name, "be given: no rule of this mask fixes it", None)
    if own is not None and given is not None and own != given:
        fail(CLASS, name, f"be {own}, the length of its tensors", given)
    length = own if given is None else given
    if most is not None and length > most:
        fail(CLASS, name, f"be at most {most}, what the blocks of from_block_map cover", length)
    return length
