"""Rivals of masked_attention: scaled_dot_product_attention with and without the mask, per document, and FlexAttention compiled."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Case, Inputs, Timer, interleaved, peak_extra_bytes, quantiles
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import maskops
from maskops import AttentionMask, BlockMap
from maskops.testing.masked_attention import seen_pairs

MASKED, PLAIN, LOOP, FLEX = "SDPA, bool mask", "SDPA, no mask", "SDPA per document", "FlexAttention, compiled"
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # FlexAttention's mask_mod: b, h, q, k


def ours(q: Tensor, k: Tensor, v: Tensor, map: BlockMap | None = None, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.masked_attention(q, k, v, map, backend=backend)


def plain(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def per_document(q: Tensor, k: Tensor, v: Tensor, document: int, **_: Any) -> Tensor:
    pieces = [x.split(document, 2) for x in (q, k, v)]
    return torch.cat([F.scaled_dot_product_attention(*piece) for piece in zip(*pieces, strict=True)], 2)


@cache
def compiled_flex() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: Any, **_: Any) -> Tensor:
    return compiled_flex()(q, k, v, block_mask=blocks)


def make(
    size: tuple[int, int, int, int], mask: Callable[[], AttentionMask] | None, dtype: torch.dtype, rule: Rule | None = None,
    document: int = 0,
) -> Any:  # fmt: skip
    def inputs(device: torch.device, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        made: Inputs = {n: torch.randn(size, generator=g).to(device, dtype) for n in ("q", "k", "v", "grad_out")}
        if mask is not None:
            found = mask().to(device).compile(size[2], size[2])
            made |= {"map": found, "seen": found.dense(), "document": document}
        if rule is not None:
            batch = None if mask is None or mask().batch == 1 else size[0]
            made["blocks"] = create_block_mask(rule, batch, None, size[2], size[2], device=device)
        return made

    return inputs


def flops(inputs: Inputs, backward: bool) -> int:
    """Two products of the tiles that are not empty; five more in the backward pass."""
    (B, H, L, D), found = inputs["q"].shape, inputs.get("map")
    pairs = seen_pairs(*((None, None) if found is None else found[:2]), B, H, L, L)
    return pairs * D * (14 if backward else 4)


# ---------------------------------------------------------------- masks

DOCUMENTS, LENGTHS = 128, torch.linspace(0.25, 1, 8)


def documents(length: int) -> AttentionMask:
    return AttentionMask.packed(torch.arange(0, length + 1, DOCUMENTS))


def padding(batch: int, length: int) -> AttentionMask:
    return AttentionMask.key_padding((LENGTHS[:batch] * length).int())


def random_blocks(length: int) -> Tensor:
    return torch.rand(length // 16, length // 16, generator=torch.Generator().manual_seed(0)) < 0.25


def patterns(length: int) -> dict[str, tuple[Callable[[], AttentionMask], Rule]]:
    blocks = random_blocks(length)
    return {
        "causal": (AttentionMask.causal, lambda b, h, q, k: k <= q),
        "window 128": (partial(AttentionMask.window, 128, 0), lambda b, h, q, k: (k <= q) & (q - k <= 128)),
        "prefix 512": (partial(AttentionMask.prefix, torch.tensor([512])), lambda b, h, q, k: (k <= q) | (k < 512)),
        "block-causal 32": (partial(AttentionMask.block_causal, 32), lambda b, h, q, k: k // 32 <= q // 32),
        "random 16x16 blocks, 25%": (
            partial(AttentionMask.from_block_map, blocks, 16, 16), lambda b, h, q, k: blocks[q // 16, k // 16],
        ),
    }  # fmt: skip


# ---------------------------------------------------------------- cases


def case(
    name: str, size: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, mask: Callable | None, rivals: dict,
    asked: dict[str, float], quick: bool = True, **options: Any,
) -> Case:  # fmt: skip
    return Case(
        f"{name} {size}", "fwd+bwd" if backward else "fwd", dtype, make(size, mask, dtype, **options), ours, rivals,
        grads=("q", "k", "v") if backward else (), work=partial(flops, backward=backward), kind="flops", asked=asked,
        quick=quick, sets="one", rounds=60,
    )  # fmt: skip


def attention_cases() -> list[Case]:
    documents_size, padded_size = (2, 12, 1024, 64), (8, 12, 512, 64)
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        full = dtype == torch.float32
        docs, padded = partial(documents, 1024), partial(padding, 8, 512)
        rivals = {MASKED: masked, LOOP: per_document}
        out += [
            case("8 documents", documents_size, dtype, False, docs, rivals, {MASKED: 8.0} if full else {"best": 1.2}, document=128),
            case("8 documents", documents_size, dtype, True, docs, {MASKED: masked, LOOP: per_document},
                 {MASKED: 6.0} if full else {}, document=128),
            case("no mask", (8, 12, 196, 64), dtype, False, None, {PLAIN: plain}, {PLAIN: 1.5 if full else 1.2}),
            case("no mask", documents_size, dtype, False, None, {PLAIN: plain}, {PLAIN: 1.5 if full else 1.2}),
            case("no mask", documents_size, dtype, True, None, {PLAIN: plain}, {}, quick=False),
            case("padded, 25 to 100%", padded_size, dtype, False, padded, {MASKED: masked}, {MASKED: 1.6 if full else 1.2}),
            case("padded, 25 to 100%", padded_size, dtype, True, padded, {MASKED: masked}, {MASKED: 1.6} if full else {}),
        ]  # fmt: skip
    return out


def flex_cases() -> list[Case]:
    """Forward only: FlexAttention has no backward pass on the CPU."""
    size, long = (2, 12, 1024, 64), (1, 12, 2048, 64)
    by_document = partial(documents, 1024), lambda b, h, q, k: q // DOCUMENTS == k // DOCUMENTS
    full, half = torch.float32, torch.bfloat16
    jobs = [(size, full, "documents", by_document), *((long, full, *item) for item in patterns(2048).items())]
    lengths = (LENGTHS * 512).int()
    padded = partial(padding, 8, 512), lambda b, h, q, k: k < lengths[b]
    everything = None, lambda b, h, q, k: q >= 0
    jobs += [
        (size, half, "documents", by_document),
        (size, half, "no mask", everything),
        ((8, 12, 512, 64), half, "padded", padded),
    ]
    return [
        case(f"{name}, against FlexAttention", shape, dtype, False, mask, {FLEX: flex} | ({MASKED: masked} if mask else {}),
             {FLEX: 1.3 if dtype == full else 1.2}, quick=False, rule=rule)
        for shape, dtype, name, (mask, rule) in jobs
    ]  # fmt: skip


def build_cases() -> list[Case]:
    """Masks to tiles, against create_block_mask, and as a share of the attention under them; L = 4096."""
    length = 4096
    ids = torch.arange(length) // 512
    eager = "create_block_mask, eager"

    def inputs(device: torch.device, seed: int) -> Inputs:
        return {"ids": ids.to(device), "seen": (ids[:, None] == ids[None]).to(device)}

    def segments(ids: Tensor, backend: str = "auto", **_: Any) -> BlockMap:
        return AttentionMask.segments(ids).compile(backend=backend)

    def dense(seen: Tensor, backend: str = "auto", **_: Any) -> BlockMap:
        return AttentionMask.dense(seen).compile(backend=backend)

    def theirs(ids: Tensor, **_: Any) -> Tensor:
        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return ids[q] == ids[k]

        return create_block_mask(rule, None, None, length, length, device=ids.device.type).kv_indices

    def theirs_dense(seen: Tensor, **_: Any) -> Tensor:
        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return seen[q, k]

        return create_block_mask(rule, None, None, length, length, device=seen.device.type).kv_indices

    def gate(made: Inputs) -> None:
        for build in (segments, dense):
            assert torch.equal(build(**made).dense()[0, 0], made["seen"]), (
                "the compiled mask differs from the dense one"
            )

    def share(build: Callable[..., BlockMap], made: Inputs) -> dict[str, Any]:
        """Of the time of a forward pass of (1, 12, length, 64) under the mask, which is asked to be at most 0.05."""
        q, k, v = torch.randn(3, 1, 12, length, 64, device=made["ids"].device)
        calls = {"build": lambda x: build(**x), "attend": lambda x: ours(q, k, v, build(**x))}
        times, _ = interleaved(calls, [made], Timer(q.device), 5, 5, 20)
        of_map, of_both = (quantiles(times[name])[1] for name in calls)
        return {"share_of_forward": of_map / (of_both - of_map)}

    return [
        Case(f"{name} ({length}, {length})", "build", torch.float32, inputs, lambda build=build, **made: build(**made).tiles,
             {eager: rival}, asked={eager: 50.0}, gate=gate, sets="one", rounds=20, quick=False, after=partial(share, build))
        for name, build, rival in (("map of segments", segments, theirs), ("map of a dense mask", dense, theirs_dense))
    ]  # fmt: skip


def long_cases() -> list[Case]:
    """A long sequence of which each query sees a hundredth: time, and the most memory of a call."""
    size = (1, 2, 16384, 64)
    tiles = size[2] // 64

    def sparse() -> AttentionMask:
        some = torch.rand(tiles, tiles, generator=torch.Generator().manual_seed(0)) < 0.006
        return AttentionMask.from_block_map(some | torch.eye(tiles, dtype=torch.bool), 64, 64)

    def gate(made: Inputs) -> None:
        """The first queries: all of them in float64 would take gigabytes."""
        q, k, v, seen = (made[n].double() if n != "seen" else made[n] for n in ("q", "k", "v", "seen"))
        exact = F.scaled_dot_product_attention(q[:, :, :256], k, v, attn_mask=seen[:, :, :256])
        torch.testing.assert_close(ours(**made)[:, :, :256].double(), exact, rtol=1e-4, atol=1e-5)

    def memory(made: Inputs) -> dict[str, Any]:
        each = made["q"].numel() * made["q"].element_size()
        extra = peak_extra_bytes(lambda: ours(**made))
        return {"extra_bytes": {"ours": extra}, "peak_of_q_k_v_out": (3 * each + extra) / (4 * each)}

    return [
        Case(f"1% of the tiles {size}", "fwd", torch.float32, make(size, sparse, torch.float32), ours, {MASKED: masked}, gate=gate,
             work=partial(flops, backward=False), kind="flops", quick=False, sets="one", rounds=10, after=memory, apart=True)
    ]  # fmt: skip


def cases() -> list[Case]:
    return attention_cases() + flex_cases() + build_cases() + long_cases()
