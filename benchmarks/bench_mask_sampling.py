"""Rivals of mask_sampling, and of split_tokens, which does the same job from a given mask."""

from typing import Any

import torch
from _harness import Case, Inputs
from _mask_laws import cases as law_cases
from torch import Tensor

import maskops
from maskops.testing.mask_sampling import TRAFFIC as SAMPLING_TRAFFIC
from maskops.testing.visible_tokens import TRAFFIC as SPLIT_TRAFFIC

RATIO = 0.75


def sort_twice(noise: Tensor, num_keep: int) -> tuple[Tensor, ...]:
    """random_masking of the published MAE: (ids_keep, ids_restore, mask)."""
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)
    mask = torch.ones(noise.shape, device=noise.device)
    mask[:, :num_keep] = 0
    return ids_shuffle[:, :num_keep], ids_restore, torch.gather(mask, 1, ids_restore)


def rand_and_sort_twice(like: Tensor, num_keep: int, **_: Any) -> tuple[Tensor, ...]:
    return sort_twice(torch.rand(like.shape, device=like.device), num_keep)


def sort_mask_twice(mask: Tensor, num_keep: int, **_: Any) -> tuple[Tensor, ...]:
    """The same from a given mask, both sorts stable, so that the ids ascend as ours."""
    ids_shuffle = mask.to(torch.uint8).argsort(stable=True, dim=1)
    return ids_shuffle[:, :num_keep], ids_shuffle[:, num_keep:], ids_shuffle.argsort(1)


def top_k(like: Tensor, num_keep: int, **_: Any) -> tuple[Tensor, ...]:
    """Only the kept ids and the mask, without the order that restoring needs."""
    kept = torch.rand(like.shape, device=like.device).topk(num_keep, dim=1, largest=False, sorted=False).indices
    return kept, torch.ones(like.shape, device=like.device).scatter_(1, kept, 0.0)


def draw(like: Tensor, num_keep: int, seed: Tensor, backend: str = "auto", **_: Any) -> tuple[Tensor, ...]:
    split = maskops.random_masking(*like.shape, num_keep=num_keep, seed=seed, device=like.device, backend=backend)
    return split.ids_keep, split.ids_restore, split.mask


def split(mask: Tensor, num_keep: int, backend: str = "auto", **_: Any) -> tuple[Tensor, ...]:
    out = maskops.split_tokens(mask, backend=backend)
    return out.ids_keep, out.ids_mask, out.ids_restore


def split_bounded(mask: Tensor, num_keep: int, backend: str = "auto", **_: Any) -> tuple[Tensor, ...]:
    out = maskops.split_tokens(mask, max_seqlen=num_keep, max_masked=mask.shape[1] - num_keep, backend=backend)
    return out.ids_keep, out.ids_mask, out.ids_restore


def make(batch: int, tokens: int) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        keep = int(tokens * (1 - RATIO))
        mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)).argsort(1) >= keep
        like = torch.empty(batch, tokens, device=device)
        return {"mask": mask.to(device), "like": like, "num_keep": keep, "seed": torch.tensor(seed, device=device)}

    return inputs


def gate_draw(inputs: Inputs) -> None:
    """The same masks as the reference, and as many visible tokens as the rival keeps."""
    ours, reference = draw(**inputs), draw(**inputs, backend="reference")
    rival = rand_and_sort_twice(**inputs)
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a, b), "random_masking differs from its reference"
    assert torch.equal(ours[2].sum(1).float(), rival[2].sum(1)), "the rival keeps another number of tokens"


def gate_split(inputs: Inputs) -> None:
    ours = split(**inputs)
    for other in (split(**inputs, backend="reference"), split_bounded(**inputs), sort_mask_twice(**inputs)):
        for a, b in zip(ours, other, strict=True):
            assert torch.equal(a, b), "split_tokens differs from its reference or from the rival"


def bytes_of_draw(inputs: Inputs) -> int:
    (batch, tokens), keep = inputs["like"].shape, inputs["num_keep"]
    counts = torch.full((batch,), keep)
    return SAMPLING_TRAFFIC["mask_sampling_uniform"](
        None, counts, None, None, tokens, keep, tokens - keep, False, 1, 1, 1
    )


def bytes_of_split(inputs: Inputs) -> int:
    mask, keep = inputs["mask"], inputs["num_keep"]
    return SPLIT_TRAFFIC["visible_tokens_split"](mask, keep, mask.shape[1] - keep)


def cases() -> list[Case]:
    out = []
    for batch, tokens in ((256, 196), (64, 1568), (8, 196), (1, 196), (64, 197)):
        asked = {"best": 5.0} if (batch, tokens) in ((256, 196), (64, 1568)) else {}
        idiom, mask_idiom = "rand + argsort x2 + gather", "argsort x2 of the mask"
        size = f"({batch},{tokens})"
        common = dict(mode="build", dtype=torch.float32, make=make(batch, tokens), sets="one", quick=bool(asked))
        out += [
            Case(
                f"random_masking {size}", ours=draw, rivals={idiom: rand_and_sort_twice, "topk, no order (less work)": top_k},
                compiled=(idiom,) if asked else (), gate=gate_draw, work=bytes_of_draw,
                asked={idiom: 5.0} if asked else {}, **common,
            ),
            Case(
                f"split {size}", ours=split, rivals={mask_idiom: sort_mask_twice, idiom: rand_and_sort_twice},
                compiled=(mask_idiom,) if asked else (), gate=gate_split, work=bytes_of_split, asked=asked, **common,
            ),
            Case(
                f"split {size} with known counts", ours=split_bounded, rivals={mask_idiom: sort_mask_twice},
                gate=gate_split, work=bytes_of_split, asked=asked, **common,
            ),
        ]  # fmt: skip
    return out + law_cases()
