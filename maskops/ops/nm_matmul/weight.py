"""NMWeight: a compressed N:M weight, how it is stored, and torch's own 2:4 layout of it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from maskops._backends import find_op
from maskops._checks import FLOATS, check_is_tensor, check_tensor, describe, fail, integer
from maskops.ops.nm_matmul.sizes import INT64, check_compressed, check_has_values, groups_in, pattern
from maskops.reference import nm_matmul as reference

CLASS, TO_TORCH, FROM_TORCH = "NMWeight", "NMWeight.to_semi_structured", "NMWeight.from_semi_structured"
# torch's layout per dtype: the pattern it holds, and its 4-bit code of a group by the places that are kept.
_TORCH_PATTERN = {torch.float16: (2, 4), torch.bfloat16: (2, 4), torch.float32: (1, 2)}
_META_ROWS, _META_CODES = 32, 4
# The codes of 4 groups are one int16; CUTLASS stores 32 rows x 2 columns of them interleaved.
_META_PLAIN, _META_STORED = "(t a1 a0 b) (u p)", "u t b a1 p a0"
_META_SIZES = {"a1": 2, "a0": 2, "b": 8, "p": 2}


class NMWeight(NamedTuple):
    """A weight [N, K] of which every group of m inputs keeps n, in compressed form.  Made by nm_compress.

    A tuple of two tensors and three ints, so it goes through torch.compile and pytrees; only `values` may need a gradient.

    Attributes:
        values: float [N, J], J = ceil(K / m) n: the kept weights, group by group, by ascending column.
        indices: uint8 [N, ceil(J bits / 8)], bits = ceil(log2 m): place j of a row, its column inside the group, stands in bits
            [j bits, (j + 1) bits), bit i being bit i % 8 of byte i / 8. A slot whose column is K or more is padding, its value 0.
        n, m: the pattern, 1 <= n < m <= 32.
        K: inputs of the dense weight.
    """

    values: Tensor
    indices: Tensor
    n: int
    m: int
    K: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), the shape of the dense weight."""
        return self.values.shape[0], self.K

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to_dense(self, *, backend: str = "auto") -> Tensor:
        """[N, K] with zeros where nothing is kept; differentiable in values."""
        for name, part in (("values", self.values), ("indices", self.indices)):
            check_is_tensor(f"{CLASS}.to_dense", name, part)
        op = find_op("nm_matmul_decompress", self.values.device.type, backend, f"{CLASS}.to_dense")
        return op(self.values, self.indices, self.n, self.m, self.K)

    def requires_grad_(self, requires_grad: bool = True) -> "NMWeight":
        """Let values ask for a gradient, or not; returns the weight itself."""
        self.values.requires_grad_(requires_grad)
        return self

    def detach(self) -> "NMWeight":
        return self._replace(values=self.values.detach())

    def to(self, *args: Any, **kwargs: Any) -> "NMWeight":
        """As Tensor.to for values; indices follow the device and keep their dtype."""
        values = self.values.to(*args, **kwargs)
        return self._replace(values=values, indices=self.indices.to(values.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Flat dict of tensors, for torch.save, safetensors or a module's state: values, indices, layout = (n, m, K)."""
        layout = torch.tensor([self.n, self.m, self.K], dtype=torch.int64)
        return {"values": self.values.detach(), "indices": self.indices, "layout": layout}

    @staticmethod
    def from_state_dict(state: dict[str, Tensor]) -> "NMWeight":
        """The inverse of state_dict; ValueError if the tensors are no compressed weight."""
        if not isinstance(state, Mapping):
            raise TypeError(f"{CLASS}: state must be a dict of tensors, got {type(state).__name__}")
        missing = {"values", "indices", "layout"} - set(state)
        if missing:
            fail(CLASS, "state", "hold values, indices and layout", f"none of {sorted(missing)}")
        layout = state["layout"]
        check_tensor(CLASS, "layout", layout, "[3]", INT64, (3,), layout)
        check_has_values(CLASS, "layout", layout)
        weight = NMWeight(state["values"], state["indices"], *layout.tolist())
        weight.check()
        return weight

    def check(self) -> None:
        """ValueError unless sizes, dtypes, places and padding are as the class says.  Asks the device."""
        pattern(CLASS, self.n, self.m)
        integer(CLASS, "K", self.K)
        if self.K < 0:
            fail(CLASS, "K", "be at least 0", self.K)
        check_is_tensor(CLASS, "values", self.values)
        check_compressed(CLASS, self.values, self.indices, self.n, self.m, self.K, FLOATS, self.values)
        check_has_values(CLASS, "values", self.values)
        groups, slots = groups_in(self.K, self.m), self.values.shape[1]
        places = reference.unpack_places(self.indices, slots, self.m).view(self.shape[0], groups, self.n)
        wrong = (places >= self.m).any(-1) | (places[..., 1:] <= places[..., :-1]).any(-1)
        if wrong.any():
            row, group = torch.nonzero(wrong)[0].tolist()
            expected = f"be {self.n} ascending places below {self.m}"
            fail(CLASS, f"indices of row {row}, group {group}", expected, places[row, group].tolist())
        padding = reference.columns_of(self.indices, self.n, self.m, self.K) == self.K
        if (padding & (self.values != 0)).any():
            row, slot = torch.nonzero(padding & (self.values != 0))[0].tolist()
            fail(CLASS, f"values[{row}, {slot}]", "be 0, its column is padding", f"{self.values[row, slot].item():g}")

    def to_semi_structured(self) -> tuple[Tensor, Tensor]:
        """The (values, metadata) that torch.sparse's CUTLASS kernels take: 2:4 for float16 and bfloat16, 1:2 for float32.

        values [N, K / 2], metadata int16 [N, K / 16], for float32 [N, K / 8]: what torch keeps in `packed` and `meta`. The layout
        holds N a multiple of 32 and K of 32 (float32: 16); torch's kernels themselves want K a multiple of 64 (float32: 32).

        Raises:
            ValueError: another pattern or dtype, or other sizes.
        """
        width = _torch_width(TO_TORCH, "values", self.values, (self.n, self.m))
        if self.shape[0] % _META_ROWS or self.K % width:
            fail(TO_TORCH, "weight", f"have N divisible by {_META_ROWS} and K by {width}", list(self.shape))
        places = reference.unpack_places(self.indices, self.values.shape[1], self.m)
        places = places.view(self.shape[0], -1, self.n)
        if self.n == 1:  # a kept float32 takes two of the four places of a code
            places = torch.cat([2 * places, 2 * places + 1], -1)
        code = places[..., 0] | places[..., 1] << 2
        shift = 4 * torch.arange(_META_CODES, device=code.device)
        meta = (rearrange(code, "r (g four) -> r g four", four=_META_CODES) << shift).sum(-1)
        meta = (meta - (meta >= 1 << 15).long() * (1 << 16)).to(torch.int16)
        stored = rearrange(meta, f"{_META_PLAIN} -> {_META_STORED}", **_META_SIZES)
        return self.values.detach().clone(), stored.reshape(meta.shape)

    @staticmethod
    def from_semi_structured(values: Tensor, metadata: Tensor) -> "NMWeight":
        """The inverse of to_semi_structured, for what torch.sparse made, too (groups with less than n nonzeros are told alike).

        Raises:
            ValueError: wrong dtype or sizes, or metadata that no weight has.
        """
        check_is_tensor(FROM_TORCH, "values", values)
        width = _torch_width(FROM_TORCH, "values", values, None)
        n, m = _TORCH_PATTERN[values.dtype]
        check_tensor(FROM_TORCH, "values", values, "[N, K / 2]", FLOATS, (None, None), values)
        outputs, K = values.shape[0], 2 * values.shape[1]
        if outputs % _META_ROWS or K % width:
            expected = f"have N divisible by {_META_ROWS} and K / 2 by {width // 2}"
            fail(FROM_TORCH, "values", expected, describe(values))
        meta_columns = K // (m * _META_CODES)
        check_tensor(FROM_TORCH, "metadata", metadata, "[N, G / 4]", (torch.int16,), (outputs, meta_columns), values)
        sizes = {**_META_SIZES, "t": outputs // _META_ROWS, "u": meta_columns // 2}
        meta = rearrange(metadata.reshape(-1), f"({_META_STORED}) -> {_META_PLAIN}", **sizes).long()
        shift = 4 * torch.arange(_META_CODES, device=meta.device)
        code = (meta[..., None] >> shift & 15).flatten(1)
        places = torch.stack([code & 3, code >> 2], -1) if n == 2 else (code & 3)[..., None] // 2
        good = (code & 3) < (code >> 2) if n == 2 else (code == 0b0100) | (code == 0b1110)
        if not good.all():
            row, group = torch.nonzero(~good)[0].tolist()
            fail(
                FROM_TORCH,
                f"metadata of row {row}, group {group}",
                "be two ascending places of four",
                bin(int(code[row, group])),
            )
        dense = values.new_zeros(*code.shape, m).scatter_(-1, places, values.view(*code.shape, n))
        compressed = find_op("nm_matmul_compress", values.device.type, "auto")(dense.flatten(1), n, m)
        return NMWeight(*compressed, n, m, K)


def _torch_width(op: str, arg: str, values: Tensor, pattern: tuple[int, int] | None) -> int:
    """What K must be a multiple of; ValueError for a dtype or pattern that torch's layout does not have."""
    found = _TORCH_PATTERN.get(values.dtype)
    if found is None or (pattern is not None and pattern != found):
        names = "; ".join(f"{n}:{m} in {str(d)[6:]}" for d, (n, m) in _TORCH_PATTERN.items())
        have = describe(values) if pattern is None else f"{pattern[0]}:{pattern[1]} in {str(values.dtype)[6:]}"
        fail(op, arg, f"be one of {names}", have)
    return 2 * found[1] * _META_CODES


# torch.load(weights_only=True) then reads a saved NMWeight; it holds tensors and ints, which are checked where they are used.
torch.serialization.add_safe_globals([NMWeight])
