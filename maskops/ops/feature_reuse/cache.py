"""ContextCache: keys and values of every layer, written in place, and the ops behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op
from maskops._checks import FLOATS, check_ids, check_is_tensor, check_tensor, describe, fail, integer
from maskops._registry import OpSpec, define_op
from maskops.ops.visible_tokens.gather import gather_tokens
from maskops.reference import feature_reuse as reference

CLASS, WRITE, EXCLUDE = "ContextCache", "ContextCache.write_", "ContextCache.exclude"
INT64, BOOL = (torch.int64,), (torch.bool,)


def check_cache(function: str, cache: object) -> None:
    if not isinstance(cache, ContextCache):
        raise TypeError(f"{function}: cache must be a ContextCache, got {type(cache).__name__}")


class ContextCache:
    """Keys and values of every layer of a bidirectional transformer, preallocated, with the set of valid tokens of each row.

    A step over all tokens writes them; a later step over a few local tokens reads the others (`cached_attention`) and computes
    only itself. Shapes never change, nothing waits for the device, and under torch.compile a write is functionalised.

    Args:
        num_layers, batch, max_tokens, heads, head_dim: sizes L, B, N, H, D.
        dtype, device: of keys and values.

    Attributes:
        keys, values: [L, B, H, N, D]; in memory a token's heads lie side by side, so that one copy writes a token.
        valid: bool [L, B, N], which tokens each row holds.

    Example:
        >>> cache = maskops.ContextCache(num_layers=1, batch=1, max_tokens=4, heads=2, head_dim=8)
        >>> q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
        >>> cache.write_(0, k, v)
        >>> ids = torch.tensor([[2, 0]])
        >>> local = maskops.cached_attention(q[:, :, [2, 0]], k[:, :, [2, 0]], v[:, :, [2, 0]], cache, 0, ids)
        >>> bool(torch.allclose(local, maskops.masked_attention(q, k, v)[:, :, [2, 0]], atol=1e-6))
        True
    """

    def __init__(
        self, num_layers: int, batch: int, max_tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        sizes = {
            "num_layers": num_layers,
            "batch": batch,
            "max_tokens": max_tokens,
            "heads": heads,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            if integer(CLASS, name, size) < 0:
                fail(CLASS, name, "be at least 0", size)
        if dtype not in FLOATS:
            fail(CLASS, "dtype", "be float32, float64, bfloat16 or float16", dtype)
        shape = (num_layers, batch, max_tokens, heads, head_dim)
        if math.prod(shape) >= 2**60:
            fail(CLASS, "num_layers, batch, max_tokens, heads and head_dim", "have a product below 2^60", shape)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3) for _ in range(2))
        self.valid = torch.zeros(shape[:3], dtype=torch.bool, device=device)

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> ContextCache:
        """A cache over given tensors, which are not copied: cached_attention has gradients with respect to them.

        Args:
            keys, values: float [L, B, H, N, D].
            valid: bool [L, B, N]. Default: all.

        Raises:
            ValueError: wrong dtype, shape or device.
        """
        check_tensor(f"{CLASS}.of", "keys", keys, "[L, B, H, N, D]", FLOATS, (None,) * 5, keys)
        check_tensor(f"{CLASS}.of", "values", values, "[L, B, H, N, D]", (keys.dtype,), keys.shape, keys)
        sizes = (*keys.shape[:2], keys.shape[3])
        if valid is None:
            valid = keys.new_ones(sizes, dtype=torch.bool)
        check_tensor(f"{CLASS}.of", "valid", valid, "[L, B, N]", BOOL, sizes, keys)
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.valid = keys, values, valid
        return cache

    @property
    def num_layers(self) -> int:
        return self.keys.shape[0]

    @property
    def max_tokens(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def layer(self, layer: int, *, function: str = f"{CLASS}.layer") -> tuple[Tensor, Tensor, Tensor]:
        """keys [B, H, N, D], values [B, H, N, D] and valid [B, N] of a layer.  function: what errors name."""
        layer = integer(function, "layer", layer)
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"{function}: layer must be in [0, {self.num_layers}), got {layer}")
        return self.keys[layer], self.values[layer], self.valid[layer]

    def write_(self, layer: int, k: Tensor, v: Tensor, ids: Tensor | None = None, *, backend: str = "auto") -> None:
        """Write keys and values of some tokens in place, and make them valid.

            keys[layer, b, :, ids[b, u]] = k[b, :, u];  the same for values;  valid[layer, b, ids[b, u]] = True

        Args:
            layer: which.
            k, v: [B, H, U, D] in the cache's dtype, any strides.
            ids: int64 [B, U], unique in each row, -1 for an empty slot (rows may write different numbers of tokens); None: the
                tokens 0 to U - 1.
            backend: "auto", "native", "triton", "reference".

        Notes:
            In place, so without a gradient: k and v that ask for one are refused while gradients are on. For gradients through
            a cache build it over your own tensors, ContextCache.of. k and v may be parts of the cache itself: what stands there
            before the write is written.

        Raises:
            ValueError: wrong dtype, shape or device, keys and values in one memory.
            IndexError: layer or an id out of range, an id twice in a row.
        """
        for name, x in (("k", k), ("v", v)):
            check_is_tensor(WRITE, name, x)
        for name, x in (("k", k), ("v", v), ("the cache's keys", self.keys), ("the cache's values", self.values)):
            if torch.is_grad_enabled() and x.requires_grad:
                fail(WRITE, name, "need no gradient (writes are in place; see ContextCache.of)", "one that requires it")
        keys, values, valid = self.layer(layer, function=WRITE)
        if ids is None:
            check_tensor(WRITE, "k", k, "[B, H, U, D]", (keys.dtype,), (*keys.shape[:2], None, keys.shape[3]), keys)
            if isinstance(k.shape[2], int) and k.shape[2] > keys.shape[2]:
                fail(WRITE, "k", f"have at most {keys.shape[2]} tokens without ids", describe(k))
            ids = torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1)
        check_is_tensor(WRITE, "ids", ids)
        k, v = self._apart(k, v)
        find_op("feature_reuse_write_", keys.device.type, backend, WRITE)(keys, values, valid, k, v, ids)
        if not torch.compiler.is_compiling() and not keys.is_inference():
            torch.autograd.graph.increment_version((self.keys, self.values, self.valid))

    def _apart(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v, copied where they lie in what is about to be written; a compiled program has no memory to share."""
        if torch.compiler.is_compiling() or self.keys.device.type == "meta":
            return k, v
        own = [x.untyped_storage().data_ptr() for x in (self.keys, self.values)]
        if own[0] == own[1] and self.keys.data_ptr() == self.values.data_ptr() and self.keys.numel():
            fail(WRITE, "the cache's values", "have memory of their own, as they are written", "that of its keys")
        k, v = (x.clone() if x.untyped_storage().data_ptr() in own else x for x in (k, v))
        return k, v

    def gather(self, layer: int, ids: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """keys and values [B, H, K, D] of the tokens ids [B, K], zeros for -1; differentiable, see gather_tokens."""
        found = []
        for x in self.layer(layer, function=f"{CLASS}.gather")[:2]:
            rows = gather_tokens(x.transpose(1, 2).flatten(2), ids, backend=backend)
            found.append(rows.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2))
        return found[0], found[1]

    def exclude(self, ids: Tensor, *, backend: str = "auto") -> CacheView:
        """All valid tokens but ids int64 [B, U] (-1: empty slot), of every layer: a view, which copies no more than valid.

        Make it once for all layers of a local step and give it to cached_attention as `exclude`.

        Raises:
            ValueError: wrong dtype, shape or device.  IndexError: an id out of range or twice in a row.
        """
        check_is_tensor(EXCLUDE, "ids", ids)
        return CacheView(
            self, find_op("feature_reuse_exclude", self.valid.device.type, backend, EXCLUDE)(self.valid, ids)
        )

    def reset_rows_(self, rows: Tensor) -> None:
        """Forget the rows of the batch where bool rows [B] is true."""
        check_is_tensor(f"{CLASS}.reset_rows_", "rows", rows)
        check_tensor(f"{CLASS}.reset_rows_", "rows", rows, "[B]", BOOL, self.valid.shape[1:2], self.valid)
        self.valid.masked_fill_(rows[None, :, None], False)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of keys, values and valid, without a gradient, for load_state_dict or torch.save."""
        return {name: getattr(self, name).detach().clone() for name in ("keys", "values", "valid")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put a saved state back, in place. Nothing changes where one of its tensors is wrong.

        Raises:
            ValueError: a tensor is missing, there is another one, or it is of another shape or dtype.
            TypeError: state is no dict.
        """
        function, names = f"{CLASS}.load_state_dict", ("keys", "values", "valid")
        if not isinstance(state, Mapping):
            raise TypeError(f"{function}: state must be a dict of tensors, got {type(state).__name__}")
        if set(state) != set(names):
            fail(function, "state", f"hold {names}", sorted(map(str, state)))
        for name in names:
            own, given = getattr(self, name), state[name]
            check_is_tensor(function, name, given)
            if given.shape != own.shape or given.dtype != own.dtype or given.is_meta:
                got = describe(given) + (" on meta" if given.is_meta else "")
                fail(function, name, f"be {describe(own)}", got)
        with torch.no_grad():
            for name in names:
                getattr(self, name).copy_(state[name])

    def __repr__(self) -> str:
        return f"ContextCache(keys={describe(self.keys)}, device={self.keys.device}, {self.nbytes / 2**20:.1f} MiB)"


class CacheView:
    """A ContextCache seen without some tokens: seen is bool [L, B, N].  Made by ContextCache.exclude."""

    def __init__(self, cache: ContextCache, seen: Tensor) -> None:
        self.cache, self.seen = cache, seen


# ---------------------------------------------------------------- the ops


def _check_write(k_cache: Tensor, v_cache: Tensor, valid: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> None:
    check_tensor(WRITE, "k_cache", k_cache, "[B, H, N, D]", FLOATS, (None,) * 4, k_cache)
    B, H, N, D = k_cache.shape
    dtype = (k_cache.dtype,)
    check_tensor(WRITE, "v_cache", v_cache, "[B, H, N, D]", dtype, (B, H, N, D), k_cache)
    check_tensor(WRITE, "valid", valid, "[B, N]", BOOL, (B, N), k_cache)
    check_tensor(WRITE, "k", k, "[B, H, U, D]", dtype, (B, H, None, D), k_cache)
    check_tensor(WRITE, "v", v, "[B, H, U, D]", dtype, k.shape, k_cache)
    check_tensor(WRITE, "ids", ids, "[B, U]", INT64, (B, k.shape[2]), k_cache)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache), ("valid", valid)):
        for axis in range(x.dim()):
            if x.stride(axis) == 0 and x.shape[axis] > 1:
                fail(WRITE, name, "have no expanded axis, as it is written", f"stride 0 along axis {axis}")


def _check_exclude(valid: Tensor, ids: Tensor) -> None:
    check_tensor(EXCLUDE, "valid", valid, "[L, B, N]", BOOL, (None, None, None), valid)
    check_tensor(EXCLUDE, "ids", ids, "[B, U]", INT64, (valid.shape[1], None), valid)


def _no_result(*args: Any) -> None:
    return None


define_op(
    OpSpec(
        "feature_reuse_write_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) valid, Tensor k, Tensor v, Tensor ids) -> ()",
        family="feature_reuse",
        reference=reference.feature_reuse_write_,
        check=_check_write,
        check_data=lambda k_cache, v_cache, valid, k, v, ids: check_ids(WRITE, "ids", ids, k_cache.shape[2]),
        fake=_no_result,
    )
)
define_op(
    OpSpec(
        "feature_reuse_exclude(Tensor valid, Tensor ids) -> Tensor",
        family="feature_reuse",
        reference=reference.feature_reuse_exclude,
        check=_check_exclude,
        check_data=lambda valid, ids: check_ids(EXCLUDE, "ids", ids, valid.shape[2]),
        fake=lambda valid, ids: valid.new_empty(valid.shape),
    )
)
