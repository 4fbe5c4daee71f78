"""The op that compiles masks: a program of rules into tiles and words."""

import torch
from torch import Tensor

from maskops._checks import check_tensor, fail
from maskops._registry import OpSpec, define_op, dynamic_size
from maskops.ops.masked_attention import program as rules
from maskops.reference import masked_attention as reference
from maskops.reference.masked_attention import TILE

MAP = "AttentionMask"


def tiles_in(length: int) -> int:
    return -(-length // TILE)


def _check_map(ints: Tensor, bytes: Tensor, program: list[int], B: int, H: int, L: int, S: int) -> None:
    check_tensor(MAP, "ints", ints, "[n]", (torch.int32,), (None,), ints)
    check_tensor(MAP, "bytes", bytes, "[n]", (torch.uint8,), (None,), ints)
    if not 1 <= rules.depth(program) <= rules.DEPTH:
        fail(MAP, "program", f"be a postfix program that needs 1 to {rules.DEPTH} values", list(program))
    for name, size in (("B", B), ("H", H), ("Lq", L), ("Lk", S)):
        if size < 0 or size >= rules.FAR:
            fail(MAP, name, f"be in [0, {rules.FAR})", size)
    for code, operands in rules.instructions(program):
        blocks = {rules.BLOCK_CAUSAL: ("block",), rules.BITS: ("q_block", "k_block")}.get(code, ())
        if any(operands[name] < 1 for name in blocks):
            fail(MAP, "program", "have positive blocks", list(program))
        if B and H and L and S:
            _check_reach(code, operands, ints.shape[0], bytes.shape[0], (B - 1, H - 1, L - 1, S - 1))


def _check_reach(code: int, o: dict[str, int], ints: int, bytes: int, last: tuple[int, int, int, int]) -> None:
    """That a rule reads inside its tensors, at the last position as at the first."""
    for name, low, high, size in rules.reach(code, o, last):
        if low < 0 or high >= size_of(size, ints, bytes):
            fail(
                MAP, "program", f"read {name} inside its {size_of(size, ints, bytes)} {size}", f"places {low} to {high}"
            )


def size_of(kind: str, ints: int, bytes: int) -> int:
    return ints if kind == "ints" else bytes


def _fake_map(ints: Tensor, bytes: Tensor, program: list[int], B: int, H: int, L: int, S: int) -> tuple[Tensor, Tensor]:
    return ints.new_empty(B, H, tiles_in(L), tiles_in(S)), ints.new_empty(dynamic_size(), TILE, dtype=torch.int64)


define_op(
    OpSpec(
        "masked_attention_map(Tensor ints, Tensor bytes, SymInt[] program, SymInt B, SymInt H, SymInt Lq, SymInt Lk)"
        " -> (Tensor tiles, Tensor words)",
        family="masked_attention",
        reference=reference.masked_attention_map,
        check=_check_map,
        fake=_fake_map,
    )
)
