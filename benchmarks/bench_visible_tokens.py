"""Rivals of visible_tokens: what published code writes with torch.gather, index_select, cat and Conv2d."""

from typing import Any

import torch
import torch.nn.functional as F
from _harness import Case, Inputs
from torch import Tensor

import maskops
from maskops import TokenSplit
from maskops.testing.visible_tokens import TRAFFIC, embed_flops

RATIO = 0.75
GATHER, SELECT, MAE = "torch.gather expanded", "index_select", "cat, gather, cat, add"
CONV = "Conv2d then gather"

# ---------------------------------------------------------------- gather


def gather_expanded(x: Tensor, ids: Tensor, **_: Any) -> Tensor:
    return torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def gather_repeated(x: Tensor, ids: Tensor, **_: Any) -> Tensor:
    """As in the published MAE, which materialises the index."""
    return torch.gather(x, 1, ids[:, :, None].repeat(1, 1, x.shape[2]))


def select_flat(x: Tensor, ids: Tensor, flat: Tensor) -> Tensor:
    """The flattened ids come ready made, in the rival's favour."""
    return x.flatten(0, 1).index_select(0, flat).view(*ids.shape, x.shape[2])


def gather(x: Tensor, ids: Tensor, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.gather_tokens(x, ids, backend=backend)


def make_gather(batch: int, tokens: int, channels: int, dtype: torch.dtype, backward: bool) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        ids = maskops.random_masking(batch, tokens, RATIO, seed=seed, device=device).ids_keep
        flat = (ids + torch.arange(batch, device=device)[:, None] * tokens).flatten()
        made = {"x": normal(seed, device, dtype, batch, tokens, channels), "ids": ids, "flat": flat}
        return {**made, "grad_out": normal(seed, device, dtype, *ids.shape, channels)} if backward else made

    return inputs


def gather_work(inputs: Inputs) -> int:
    work = TRAFFIC["visible_tokens_gather"](inputs["x"], inputs["ids"])
    if "grad_out" in inputs:
        work += TRAFFIC["_visible_tokens_gather_backward"](inputs["grad_out"], inputs["ids"], inputs["x"].shape[1])
    return work


def gather_cases() -> list[Case]:
    sizes = [(64, 196, 768), (64, 196, 1024), (8, 196, 768), (1, 196, 768), (7, 197, 385), (64, 1568, 768)]
    out = []
    for size in sizes:
        head = size == sizes[0]
        for dtype in (torch.float32, torch.bfloat16) if head else (torch.float32,):
            rivals = {GATHER: gather_expanded, SELECT: select_flat, "torch.gather repeated (MAE)": gather_repeated}
            compiled = (GATHER, SELECT) if head else ()
            asked = {"best": 1.0, GATHER: 5.0} if head else {}
            out.append(
                Case(
                    f"gather {list(size)}",
                    mode="fwd",
                    dtype=dtype,
                    make=make_gather(*size, dtype, False),
                    ours=gather,
                    rivals=rivals,
                    compiled=compiled,
                    work=gather_work,
                    asked=asked,
                    quick=head,
                )
            )
        out.append(
            Case(
                f"gather {list(size)}",
                mode="fwd+bwd",
                dtype=torch.float32,
                make=make_gather(*size, torch.float32, True),
                ours=gather,
                rivals=rivals,
                compiled=compiled,
                grads=("x",),
                work=gather_work,
                quick=False,
            )
        )
    return out


# ---------------------------------------------------------------- restore


def restore_published(x: Tensor, split: TokenSplit, token: Tensor, pos: Tensor) -> Tensor:
    """Input of the decoder in the published MAE, with an expanded instead of a repeated index, in the rival's favour."""
    batch, tokens = split.ids_restore.shape
    tail = token.repeat(batch, tokens + 1 - x.shape[1], 1)
    rows = torch.cat([x[:, 1:], tail], dim=1)
    rows = torch.gather(rows, 1, split.ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :1], rows], dim=1) + pos


def restore_indexed(x: Tensor, split: TokenSplit, token: Tensor, pos: Tensor) -> Tensor:
    """The other usual way: an output full of mask tokens, into which the visible rows are scattered."""
    batch, tokens = split.ids_restore.shape
    rows = token.expand(batch, tokens, -1).clone()
    rows = rows.scatter(1, split.ids_keep[:, :, None].expand(-1, -1, x.shape[2]), x[:, 1:])
    return torch.cat([x[:, :1], rows], dim=1) + pos


def restore(x: Tensor, split: TokenSplit, token: Tensor, pos: Tensor, backend: str = "auto") -> Tensor:
    return maskops.restore_tokens(x, split, token, pos=pos, prefix=1, backend=backend)


def make_restore(batch: int, tokens: int, channels: int, dtype: torch.dtype, backward: bool) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        split = maskops.random_masking(batch, tokens, RATIO, seed=seed, device=device)
        made = {
            "x": normal(seed, device, dtype, batch, 1 + split.max_seqlen, channels), "split": split,
            "token": normal(seed + 1, device, dtype, 1, 1, channels),
            "pos": normal(seed + 2, device, dtype, 1, 1 + tokens, channels),
        }  # fmt: skip
        return {**made, "grad_out": normal(seed, device, dtype, batch, 1 + tokens, channels)} if backward else made

    return inputs


def restore_work(inputs: Inputs) -> int:
    x, split, pos = inputs["x"], inputs["split"], inputs["pos"][0]
    work = TRAFFIC["visible_tokens_restore"](x, split.ids_restore, split.num_keep, inputs["token"][0, 0], pos, 1)
    if "grad_out" in inputs:
        rows = inputs["grad_out"], split.ids_restore, split.num_keep, split.max_seqlen
        work += TRAFFIC["_visible_tokens_restore_backward"](*rows, 1, 1, True, True, False)
    return work


def restore_cases() -> list[Case]:
    sizes = [(64, 196, 768), (64, 196, 512), (8, 196, 512), (1, 196, 512), (7, 197, 385)]
    out = []
    for size in sizes:
        head = size == sizes[0]
        for dtype in (torch.float32, torch.bfloat16) if head else (torch.float32,):
            for mode in ("fwd", "fwd+bwd"):
                backward, main = mode == "fwd+bwd", head and dtype == torch.float32
                out.append(
                    Case(
                        f"restore + mask token + pos {list(size)}", mode=mode, dtype=dtype,
                        make=make_restore(*size, dtype, backward), ours=restore,
                        rivals={MAE: restore_published, "clone, scatter, cat, add": restore_indexed},
                        compiled=(MAE, "clone, scatter, cat, add") if head else (), grads=("x", "token") if backward else (),
                        work=restore_work, asked={"eager": 2.5, "compiled": 1.5} if head else {}, quick=main,
                    )
                )  # fmt: skip
    return out


# ---------------------------------------------------------------- embed and patchify


def conv_then_gather(images: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, ids: Tensor) -> Tensor:
    x = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + pos
    return torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def cut_then_linear(images: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, ids: Tensor) -> Tensor:
    """What a careful user writes: cut all patches, gather the visible ones, project only those."""
    batch, channels, height, width = images.shape
    p, q = weight.shape[2:]
    x = (
        images.view(batch, channels, height // p, p, width // q, q)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(batch, -1, channels * p * q)
    )
    x = torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[2]))
    return F.linear(x, weight.flatten(1), bias) + pos[0][ids]


def embed(images: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, ids: Tensor, backend: str = "auto") -> Tensor:
    return maskops.embed_patches(images, weight, bias, tuple(weight.shape[2:]), ids, pos=pos, backend=backend)


def make_embed(batch: int, size: int, patch: int, width: int, dtype: torch.dtype) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        tokens = (size // patch) ** 2
        ids = maskops.random_masking(batch, tokens, RATIO, seed=seed, device=device).ids_keep
        return {
            "images": normal(seed, device, dtype, batch, 3, size, size), "ids": ids,
            "weight": normal(seed + 1, device, dtype, width, 3, patch, patch, scale=0.03),
            "bias": normal(seed + 2, device, dtype, width),
            "pos": normal(seed + 3, device, dtype, 1, tokens, width),
            "grad_out": normal(seed + 4, device, dtype, *ids.shape, width),
        }  # fmt: skip

    return inputs


def embed_cases() -> list[Case]:
    sizes = [(32, 224, 16, 768), (8, 224, 16, 768), (1, 224, 16, 768), (32, 224, 14, 1024), (5, 224, 32, 385)]
    out = []
    for size in sizes:
        head = size == sizes[0]
        for dtype in (torch.float32, torch.bfloat16) if head else (torch.float32,):
            batch, pixels, patch, width = size
            out.append(
                Case(
                    f"embed_patches batch {batch}, {pixels}/{patch}, D={width}", mode="fwd+bwd", dtype=dtype,
                    make=make_embed(*size, dtype), ours=embed, grads=("weight", "bias"), kind="flops",
                    rivals={CONV: conv_then_gather, "cut all, gather, Linear": cut_then_linear},
                    compiled=(CONV,) if head else (), asked={CONV: 2.5} if head else {}, quick=head, sets="one",
                    work=lambda i: 2 * embed_flops(i["images"], i["weight"], i["ids"]),
                )
            )  # fmt: skip
    return out


def cut_all(images: Tensor, patch: int, ids: Tensor) -> Tensor:
    batch, channels, height, width = images.shape
    x = images.view(batch, channels, height // patch, patch, width // patch, patch)
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, channels * patch**2)
    return torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def cut(images: Tensor, patch: int, ids: Tensor, backend: str = "auto") -> Tensor:
    return maskops.patchify(images, patch, ids, backend=backend)


def make_cut(batch: int, dtype: torch.dtype) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        ids = maskops.random_masking(batch, 196, RATIO, seed=seed, device=device).ids_keep
        return {"images": normal(seed, device, dtype, batch, 3, 224, 224), "patch": 16, "ids": ids}

    return inputs


def other_cases() -> list[Case]:
    def pack(x: Tensor, split: TokenSplit, backend: str = "auto", **_: Any) -> Tensor:
        return maskops.pack_tokens(x, split, backend=backend)

    def index_mask(x: Tensor, visible: Tensor, **_: Any) -> Tensor:
        return x[visible]

    def make_pack(device: torch.device, seed: int) -> Inputs:
        mask = torch.rand(64, 196, generator=torch.Generator().manual_seed(seed)) < 0.75
        split = maskops.split_tokens(mask.to(device))
        return {"x": normal(seed, device, torch.float32, 64, 196, 768), "split": split, "visible": ~mask.to(device)}

    def pack_work(i: Inputs) -> int:
        return TRAFFIC["visible_tokens_pack"](i["x"], i["split"].ids_restore, i["split"].cu_seqlens, i["split"].total)

    return [
        Case("pack [64, 196, 768], ragged", "fwd", torch.float32, make_pack, pack, {"x[mask]": index_mask},
             work=pack_work, quick=False),
        Case(
            "patchify visible, batch 64, 224/16", "fwd", torch.float32, make_cut(64, torch.float32), cut, quick=False,
            rivals={"cut all, gather": cut_all}, work=lambda i: TRAFFIC["visible_tokens_patchify"](i["images"], i["ids"], [16, 16]),
        ),
    ]  # fmt: skip


def normal(seed: int, device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(scale).to(device, dtype)


# ---------------------------------------------------------------- mask and tokens together


def total_ours(x: Tensor, like: Tensor, backend: str = "auto", **_: Any) -> tuple[Tensor, ...]:
    split = maskops.random_masking(*like.shape, RATIO, device=like.device, backend=backend)
    return (maskops.gather_tokens(x, split.ids_keep, backend=backend),)


def total_published(x: Tensor, like: Tensor, **_: Any) -> tuple[Tensor, ...]:
    ids_shuffle = torch.rand(like.shape, device=like.device).argsort(1)
    ids_restore = ids_shuffle.argsort(1)
    keep = int(like.shape[1] * (1 - RATIO))
    mask = torch.ones(like.shape, device=like.device)
    mask[:, :keep] = 0
    return gather_expanded(x, ids_shuffle[:, :keep]), torch.gather(mask, 1, ids_restore)


def total_cases() -> list[Case]:
    def inputs(device: torch.device, seed: int) -> Inputs:
        return {"x": normal(seed, device, torch.float32, 64, 196, 768), "like": torch.empty(64, 196, device=device)}

    def gate(made: Inputs) -> None:
        assert total_ours(**made)[0].shape == total_published(**made)[0].shape, (
            "the rival gathers another number of rows"
        )

    name = "total: random_masking + gather [64, 196, 768]"
    return [
        Case(
            name,
            "fwd",
            torch.float32,
            inputs,
            total_ours,
            {"rand, argsort x2, gather (MAE)": total_published},
            gate=gate,
        )
    ]


def cases() -> list[Case]:
    return gather_cases() + restore_cases() + embed_cases() + other_cases() + total_cases()
