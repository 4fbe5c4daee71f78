"""The rules of an attention mask as data: a postfix program that one kernel evaluates, tile by tile, on every device.

An instruction is WIDTH integers, its code first.  q and k are positions of query and key, b and h batch and head. Offsets point
into the tensor of integers, for BITS and the matrix of GROUPS into the tensor of bytes.
"""

from maskops.reference.masked_attention import (
    AND,
    BAND,
    BITS,
    BLOCK_CAUSAL,
    GROUPS,
    KEY_RANGE,
    LENGTH,
    NOT,
    OR,
    ROW_RANGE,
    SAME,
    WIDTH,
)

DEPTH = 4  # values on the stack at most: the kernels keep them in registers
FAR = 1 << 30  # further than any position

NAMES = ("AND", "OR", "NOT", "ROW_RANGE", "KEY_RANGE", "LENGTH", "BAND", "BLOCK_CAUSAL", "SAME", "GROUPS", "BITS")
# What the numbers after the code mean.
OPERANDS = {
    AND: (), OR: (), NOT: (),
    ROW_RANGE: ("start", "end", "stride_b", "stride_h"),  # start[b, h, q] <= k < end[b, h, q]
    KEY_RANGE: ("start", "end", "stride_b", "stride_h"),  # start[b, h, k] <= q < end[b, h, k]
    LENGTH: ("at", "stride_b", "stride_h"),               # k < length[b, h]
    BAND: ("low", "high"),                                # low <= k - q <= high
    BLOCK_CAUSAL: ("block",),                             # k / block <= q / block
    SAME: ("q_at", "k_at", "q_stride_b", "k_stride_b"),   # ids_q[b, q] == ids_k[b, k]
    GROUPS: ("q_at", "k_at", "q_stride_b", "k_stride_b", "matrix", "groups"),  # matrix[ids_q[b, q], ids_k[b, k]]
    BITS: ("at", "stride_b", "stride_h", "stride_q", "q_block", "k_block"),  # bit[b, h, q / q_block, k / k_block], rows of bytes
}  # fmt: skip
_ON_INTS = {
    ROW_RANGE: ("start", "end"), KEY_RANGE: ("start", "end"), LENGTH: ("at",), SAME: ("q_at", "k_at"), GROUPS: ("q_at", "k_at"),
}  # fmt: skip
_ON_BYTES = {GROUPS: ("matrix",), BITS: ("at",)}


def instruction(code: int, **operands: int) -> tuple[int, ...]:
    values = tuple(operands[name] for name in OPERANDS[code])
    return (code, *values, *(0,) * (WIDTH - 1 - len(values)))


def instructions(program: tuple[int, ...] | list[int]) -> list[tuple[int, dict[str, int]]]:
    """[(code, its operands by name)]"""
    found = []
    for at in range(0, len(program), WIDTH):
        code = program[at]
        found.append((code, dict(zip(OPERANDS[code], program[at + 1 : at + WIDTH], strict=False))))
    return found


def moved(program: tuple[int, ...], ints: int, bytes: int) -> tuple[int, ...]:
    """The program on tensors in front of which so many integers and bytes were put."""
    out = list(program)
    for at in range(0, len(program), WIDTH):
        code = program[at]
        for names, step in ((_ON_INTS, ints), (_ON_BYTES, bytes)):
            for name in names.get(code, ()):
                out[at + 1 + OPERANDS[code].index(name)] += step
    return tuple(out)


def depth(program: tuple[int, ...] | list[int]) -> int:
    """Values on the stack at most; 0 where the program is none: an unknown code, or not one value at its end."""
    most = now = 0
    for at in range(0, len(program), WIDTH):
        code = program[at]
        if code not in OPERANDS:
            return 0
        needed = 2 if code in (AND, OR) else 1 if code == NOT else 0
        if now < needed:
            return 0
        now += 1 - needed
        most = max(most, now)
    return most if now == 1 and len(program) % WIDTH == 0 else 0


def joined(a: tuple[int, ...], b: tuple[int, ...], code: int) -> tuple[int, ...]:
    """a, b, code; the deeper one first, which needs the smaller stack."""
    first, second = (a, b) if depth(a) >= depth(b) else (b, a)
    return first + second + instruction(code)


def reach(code: int, o: dict[str, int], last: tuple[int, int, int, int]) -> list[tuple[str, int, int, str]]:
    """(operand, lowest place read, highest one, "ints" or "bytes"), where b, h, q, k go up to `last`."""
    b, h, q, k = last
    if code in (ROW_RANGE, KEY_RANGE):
        step = b * o["stride_b"] + h * o["stride_h"] + (q if code == ROW_RANGE else k)
        return [(name, min(o[name], o[name] + step), max(o[name], o[name] + step), "ints") for name in ("start", "end")]
    if code == LENGTH:
        step = b * o["stride_b"] + h * o["stride_h"]
        return [("at", min(o["at"], o["at"] + step), max(o["at"], o["at"] + step), "ints")]
    if code in (SAME, GROUPS):
        steps = {"q_at": b * o["q_stride_b"] + q, "k_at": b * o["k_stride_b"] + k}
        found = [(n, min(o[n], o[n] + step), max(o[n], o[n] + step), "ints") for n, step in steps.items()]
        return found + (
            [("matrix", o["matrix"], o["matrix"] + o["groups"] ** 2 - 1, "bytes")] if code == GROUPS else []
        )
    if code == BITS:
        step = b * o["stride_b"] + h * o["stride_h"] + q // o["q_block"] * o["stride_q"] + k // o["k_block"] // 8
        return [("at", min(o["at"], o["at"] + step), max(o["at"], o["at"] + step), "bytes")]
    return []
