"""Modules of the family nm_matmul: linear layers N outputs x K inputs whose weight is N:M, learns to be, or is masked by bits."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops._checks import FLOATS, check_is_tensor, check_tensor, describe, fail, integer
from maskops.ops.mask_sampling import Seed
from maskops.ops.nm_matmul import (
    NMWeight,
    bitmask_linear,
    nm_compress,
    nm_linear,
    nm_mask_of_logits,
    nm_soft_linear,
    pack_bitmask,
    unpack_bitmask,
)
from maskops.ops.nm_matmul.sizes import check_compressed, pattern
from maskops.ops.nm_matmul.soft import MOST_PATTERNS


class NMLinear(nn.Module):
    """A linear layer that stores and reads only the n of every m inputs that it keeps.  See nm_linear.

    State: values (trained), indices and layout = (n, m, K) (buffers), bias; all plain tensors, so that safetensors takes them.
    """

    def __init__(self, weight: NMWeight, bias: Tensor | None = None):
        """weight: made by nm_compress; bias [N] or None. Both become parameters, copied."""
        super().__init__()
        if not isinstance(weight, NMWeight):
            raise TypeError(f"NMLinear: weight must be an NMWeight, got {type(weight).__name__}")
        pattern("NMLinear", weight.n, weight.m)
        check_compressed("NMLinear", weight.values, weight.indices, weight.n, weight.m, weight.K, FLOATS, weight.values)
        if bias is not None:
            check_tensor("NMLinear", "bias", bias, "[N]", FLOATS, (weight.shape[0],), weight.values)
        state = weight.state_dict()
        self.n, self.m, self.in_features, self.out_features = weight.n, weight.m, weight.K, weight.shape[0]
        self.values = nn.Parameter(state["values"].clone())
        self.register_buffer("indices", state["indices"].clone())
        self.register_buffer("layout", state["layout"])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_dense(cls, linear: nn.Linear, n: int, m: int, *, mask: Tensor | None = None) -> "NMLinear":
        """The layer of a dense one whose weight is N:M already, or becomes it under `mask`, bool [N, K] (see nm_mask)."""
        check_linear("NMLinear", linear)
        weight = linear.weight.detach()
        if mask is not None:
            check_tensor("NMLinear", "mask", mask, "[N, K]", (torch.bool,), weight.shape, weight)
            weight = torch.where(mask, weight, 0)
        return cls(nm_compress(weight, n, m), linear.bias)

    @property
    def weight(self) -> NMWeight:
        return NMWeight(self.values, self.indices, self.n, self.m, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return nm_linear(x, self.weight, self.bias)

    def to_dense(self) -> nn.Linear:
        """The same layer as nn.Linear."""
        return _dense_linear(self.weight.to_dense(), self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Two patterns can have tensors of the same sizes, so the layout must be the same one, and the places must make sense."""
        found, errors, want = state_dict.get(f"{prefix}layout"), args[-1], [self.n, self.m, self.in_features]
        if isinstance(found, Tensor) and not found.is_meta and found.tolist() != want:
            errors.append(f"{prefix}layout: the state is of (n, m, K) = {found.tolist()}, this module of {want}")
            return
        stored = [state_dict.get(f"{prefix}{name}") for name in ("values", "indices")]
        if all(isinstance(x, Tensor) and not x.is_meta for x in stored):
            try:
                NMWeight(*stored, *want).check()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix.rstrip('.') or 'NMLinear'}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, pattern={self.n}:{self.m}, bias={self.bias is not None}"


class SoftNMLinear(nn.Module):
    """A linear layer on a frozen weight that learns which n of every m inputs to keep.  See nm_soft_linear.

    While training it multiplies by a sampled soft mask and leaves the squared norm of the masked weight in `kept_norm`; in
    evaluation by the most likely mask. `tau` and `scale` are plain attributes, to be set by a schedule.
    """

    def __init__(
        self, in_features: int, out_features: int, n: int, m: int, *, bias: bool = True, per_pattern: bool = True,
        tau: float = 1.0, scale: float = 1.0, hard: bool = False, std: float = 0.01,
    ):  # fmt: skip
        """per_pattern: a logit for each of the C(m, n) <= 128 patterns of a group, else one per weight; they start as noise of
        the given std."""
        super().__init__()
        in_features, out_features = feature_counts("SoftNMLinear", in_features, out_features)
        n, m = pattern("SoftNMLinear", n, m)
        if in_features % m:
            fail("SoftNMLinear", "in_features", f"be divisible by m = {m}", in_features)
        if per_pattern and math.comb(m, n) > MOST_PATTERNS:
            fail(
                "SoftNMLinear",
                "n and m",
                f"have at most {MOST_PATTERNS} patterns, or per_pattern be False",
                math.comb(m, n),
            )
        self.n, self.m, self.tau, self.scale, self.hard = n, m, tau, scale, hard
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        _reset(self.weight, self.bias)
        size = (in_features // m, math.comb(m, n)) if per_pattern else (in_features,)
        self.logits = nn.Parameter(torch.empty(out_features, *size))
        nn.init.normal_(self.logits, std=std)
        self.kept_norm: Tensor | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, n: int, m: int, **options: Any) -> "SoftNMLinear":
        """The layer on the weight and bias of a dense one; options as in the constructor."""
        check_linear("SoftNMLinear", linear)
        soft = cls(linear.in_features, linear.out_features, n, m, bias=linear.bias is not None, **options)
        soft.to(device=linear.weight.device)
        for name in ("weight", "bias"):
            if getattr(linear, name) is not None:
                setattr(soft, name, nn.Parameter(getattr(linear, name).detach().clone(), requires_grad=False))
        return soft

    def forward(self, x: Tensor, *, seed: Seed = None, generator: torch.Generator | None = None) -> Tensor:
        """x [..., K] -> [..., N].  seed, generator: of the noise, while training."""
        if not self.training:
            return F.linear(x, torch.where(self.mask(), self.weight, 0), self.bias)
        y, self.kept_norm = nm_soft_linear(
            x, self.weight, self.logits, self.n, self.m, tau=self.tau, scale=self.scale, seed=seed, generator=generator,
            hard=self.hard,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # kept_norm is a result with a graph behind it, which can be neither copied nor pickled.
        return {**self.__dict__, "kept_norm": None}

    def mask(self) -> Tensor:
        """bool [N, K], the most likely mask."""
        return nm_mask_of_logits(self.logits, self.n, self.m)

    def harden(self) -> NMLinear:
        """The compressed layer of the most likely mask."""
        return NMLinear(nm_compress(torch.where(self.mask(), self.weight, 0), self.n, self.m), self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"
        options = f"tau={self.tau}, scale={self.scale}, hard={self.hard}"
        return f"{sizes}, pattern={self.n}:{self.m}, per_pattern={self.logits.dim() == 3}, bias={self.bias is not None}, {options}"


class BitmaskLinear(nn.Module):
    """A linear layer under a bit-packed mask, its own or one that is given, also one per sample.  See bitmask_linear."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, scores: bool = False):
        """scores: with a parameter [N, K] that receives the straight-through gradient of the mask.  Nothing is masked at first."""
        super().__init__()
        in_features, out_features = feature_counts("BitmaskLinear", in_features, out_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        _reset(self.weight, self.bias)
        self.scores = nn.Parameter(torch.zeros(out_features, in_features)) if scores else None
        self.register_buffer("bitmask", pack_bitmask(torch.ones(out_features, in_features, dtype=torch.bool)))

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor, *, scores: bool = False) -> "BitmaskLinear":
        """The layer on copies of the weight and bias of a dense one under `mask`, bool [N, K]."""
        check_linear("BitmaskLinear", linear)
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, scores=scores)
        layer.to(device=linear.weight.device, dtype=linear.weight.dtype)
        layer.weight = nn.Parameter(linear.weight.detach().clone())
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        layer.set_mask(mask)
        return layer

    def set_mask(self, mask: Tensor) -> None:
        """Take another mask, bool [N, K] or what expands to it."""
        check_is_tensor("BitmaskLinear", "mask", mask)
        N, K = self.weight.shape
        if mask.dim() > 2 or any(a not in (1, b) for a, b in zip(reversed(mask.shape), (K, N), strict=False)):
            fail("BitmaskLinear", "mask", f"expand to [N, K] = [{N}, {K}]", describe(mask))
        self.bitmask = pack_bitmask(mask.expand(N, K))

    def mask(self) -> Tensor:
        """bool [N, K], the layer's own mask."""
        return unpack_bitmask(self.bitmask, self.weight.shape[1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A bitmask of another dtype would be cut down to bytes in silence."""
        found = state_dict.get(f"{prefix}bitmask")
        if isinstance(found, Tensor) and found.dtype != torch.uint8:
            args[-1].append(f"{prefix}bitmask: must be uint8, got {describe(found)}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, bitmask: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N].  bitmask: uint8 [N, ceil(K / 8)], or [S, N, ceil(K / 8)] for x [S, ..., K]; default: its own."""
        bitmask = self.bitmask if bitmask is None else bitmask
        return bitmask_linear(x, self.weight, bitmask, self.bias, scores=self.scores)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"
        return f"{sizes}, bias={self.bias is not None}, scores={self.scores is not None}"


def feature_counts(module: str, in_features: object, out_features: object) -> tuple[int, int]:
    sizes = integer(module, "in_features", in_features), integer(module, "out_features", out_features)
    for name, size in zip(("in_features", "out_features"), sizes, strict=True):
        if size < 0:
            fail(module, name, "be at least 0", size)
    return sizes


def check_linear(module: str, linear: object) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{module}: linear must be an nn.Linear, got {type(linear).__name__}")


def _reset(weight: Tensor, bias: Tensor | None) -> None:
    """As torch.nn.Linear does."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] else 0.0
        nn.init.uniform_(bias, -bound, bound)


def _dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
