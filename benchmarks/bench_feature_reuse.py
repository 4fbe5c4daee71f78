"""Rivals of feature_reuse: caches by cat and index_put_, gather + cat + SDPA, softmax + multinomial + gather + topk, full steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _harness import Case, Inputs
from torch import Tensor

import maskops
from maskops import ContextCache
from maskops.generation import MaskedGenerator, ReCAP, _Run
from maskops.models.maskgit import MaskGIT, MaskGITConfig
from maskops.testing.feature_reuse import TRAFFIC

H, D, N, U = 12, 64, 257, 33  # MaskGIT's size: 256 tokens and a class token; 32 local ones and it
HALF = torch.bfloat16


def complement(ids: Tensor, tokens: int) -> Tensor:
    """[B, N - U]: the tokens that ids [B, U] does not name, as the published loop finds them."""
    hidden = torch.zeros(ids.shape[0], tokens, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
    return hidden.int().argsort(dim=1, stable=True)[:, : tokens - ids.shape[1]]


def gathered(x: Tensor, ids: Tensor) -> Tensor:
    """Rows ids [B, K] of x [B, H, N, D]."""
    return x.gather(2, ids[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


# ---------------------------------------------------------------- attention of a local step


def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, ids: Tensor, backend: str = "auto", **_: Any
) -> Tensor:
    return maskops.cached_attention(q, k, v, ContextCache.of(keys[None], values[None]), 0, ids, backend=backend)


def gather_cat_sdpa(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, ids: Tensor, **_: Any) -> Tensor:
    rest = complement(ids, keys.shape[2])
    return F.scaled_dot_product_attention(
        q, torch.cat([gathered(keys, rest), k], 2), torch.cat([gathered(values, rest), v], 2)
    )


def local_inputs(batch: int, dtype: torch.dtype) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        local = {n: torch.randn(batch, U, H, D, generator=g).to(device, dtype).transpose(1, 2) for n in ("q", "k", "v")}
        cached = {
            n: torch.randn(batch, N, H, D, generator=g).to(device, dtype).transpose(1, 2) for n in ("keys", "values")
        }
        ids = torch.rand(batch, N, generator=g).argsort(1)[:, :U].to(device).contiguous()
        return {**local, **cached, "ids": ids, "cache": ContextCache.of(cached["keys"][None], cached["values"][None])}

    return inputs


def attention_bytes(i: Inputs) -> int:
    seen = torch.ones(i["ids"].shape[0], N, dtype=torch.bool)
    return TRAFFIC["feature_reuse_attention"](i["q"], i["k"], i["v"], i["keys"], i["values"], seen, i["ids"], 1.0)


# ---------------------------------------------------------------- write and read of a layer
# index_put_ moves the same bytes at nearly the copy roof, without the checks, empty slots and flags: nothing is left to win there.


def write_and_read(
    k: Tensor, v: Tensor, cache: ContextCache, ids: Tensor, backend: str = "auto", **_: Any
) -> tuple[Tensor, Tensor]:
    """Local rows into the cache; attention reads it where it is, so reading it is a view."""
    cache.write_(0, k, v, ids, backend=backend)
    return cache.keys[0], cache.values[0]


def index_put(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
    for cache, new in ((keys, k), (values, v)):
        cache.transpose(1, 2).index_put_((rows, ids), new.transpose(1, 2))
    return keys, values


def cat_and_reorder(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """dKV-Cache: cached and fresh concatenated, then put in order."""
    rest = complement(ids, keys.shape[2])
    order = torch.cat([rest, ids], 1).argsort(1)
    return tuple(gathered(torch.cat([gathered(x, rest), new], 2), order) for x, new in ((keys, k), (values, v)))


def gate_write(i: Inputs) -> None:
    """All of them leave the same cache; writing twice changes nothing, so that they may take turns."""
    copy = ContextCache.of(i["keys"].clone()[None], i["values"].clone()[None])
    wanted = write_and_read(**{**i, "cache": copy}, backend="reference")
    for contender in (cat_and_reorder, index_put, write_and_read):
        for a, b in zip(contender(**i), wanted, strict=True):
            assert torch.equal(a, b), f"{contender.__name__} leaves another cache"


def write_bytes(i: Inputs) -> int:
    return 2 * (i["k"].numel() + i["v"].numel()) * i["k"].element_size()


# ---------------------------------------------------------------- choices


def choose(logits: Tensor, known: Tensor, seed: Tensor, backend: str = "auto", **_: Any) -> tuple[Tensor, ...]:
    found = maskops.confidence_select(logits, known, 16, temperature=4.5, seed=seed, backend=backend)
    return found.ids, found.tokens


def softmax_multinomial(logits: Tensor, known: Tensor, seed: Tensor, **_: Any) -> tuple[Tensor, ...]:
    p = logits.float().softmax(-1)
    tokens = torch.multinomial(p.flatten(0, 1), 1).view(known.shape)
    picked = p.gather(2, tokens[..., None])[..., 0]
    gumbel = -torch.log(-torch.log(torch.rand_like(picked).clamp(1e-20)))
    confidence = torch.where(known, torch.inf, picked.log() + 4.5 * gumbel)
    return torch.where(known, -torch.inf, confidence).topk(16, dim=1).indices, tokens


def gumbel_argmax(logits: Tensor, known: Tensor, seed: Tensor, **_: Any) -> tuple[Tensor, ...]:
    """Samples by Gumbel noise on every logit, as LLaDA's code does."""
    tokens = (
        logits.float() - torch.log(-torch.log(torch.rand(logits.shape, device=logits.device).clamp(1e-20)))
    ).argmax(-1)
    picked = logits.float().log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    gumbel = -torch.log(-torch.log(torch.rand_like(picked).clamp(1e-20)))
    return torch.where(known, -torch.inf, picked + 4.5 * gumbel).topk(16, dim=1).indices, tokens


def logits_of(batch: int, tokens: int, vocabulary: int, dtype: torch.dtype) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        logits = (3 * torch.randn(batch, tokens, vocabulary, generator=g)).to(device, dtype)
        known = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
        return {"logits": logits, "known": known, "seed": torch.tensor([seed, 0], device=device)}

    return inputs


def gate_choice(i: Inputs) -> None:
    # A sum in another order may take the neighbouring token now and then: the more tokens there are, the nearer they lie.
    least = 1 - max(1e-3, 2e-7 * i["logits"].shape[-1])
    for a, b in zip(choose(**i), choose(**i, backend="reference"), strict=True):
        same = (a == b).double().mean()
        assert same > least, f"confidence_select differs from its reference in {1 - same:.2%}"


def choice_bytes(i: Inputs) -> int:
    return TRAFFIC["feature_reuse_sample"](i["logits"], i["known"])


# ---------------------------------------------------------------- steps and generations of a whole network


_MODELS: dict[torch.dtype, MaskGIT] = {}


def network(dtype: torch.dtype) -> MaskGIT:
    """24 layers of 768 channels, 256 tokens, 1024 codes."""
    if dtype not in _MODELS:
        torch.manual_seed(0)
        _MODELS[dtype] = MaskGIT(MaskGITConfig()).eval().to(dtype)
    return _MODELS[dtype]


class Rival(_Run):
    """The published loop's local step: gather by complement, concatenate, SDPA, in every layer."""

    def local_attention(self, local: Tensor) -> Any:
        prefix = torch.arange(self.model.prefix, device=local.device).expand(len(local), -1)
        ids = torch.cat([prefix, local + self.model.prefix], 1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return gather_cat_sdpa(q, k, v, self.cache.keys[layer], self.cache.values[layer], ids)

        return attend


def run_of(kind: type, batch: int, dtype: torch.dtype) -> _Run:
    run = kind(MaskedGenerator(network(dtype), [256]), torch.full((batch, 256), -1), None, 0, 0)
    with torch.no_grad():
        run.forward(None, store=True)
    return run


def step_inputs(batch: int, dtype: torch.dtype) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        ids = torch.rand(batch, 256, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :32].contiguous()
        return {"ours_run": run_of(_Run, batch, dtype), "rival_run": run_of(Rival, batch, dtype), "ids": ids}

    return inputs


def local_step(ours_run: _Run, rival_run: _Run, ids: Tensor, **_: Any) -> Tensor:
    return ours_run.forward(ids)


def rival_local_step(ours_run: _Run, rival_run: _Run, ids: Tensor, **_: Any) -> Tensor:
    return rival_run.forward(ids)


def full_step(ours_run: _Run, rival_run: _Run, ids: Tensor, **_: Any) -> Tensor:
    return ours_run.forward(None)


def gate_step(i: Inputs) -> None:
    ours, rival = (run(**i) for run in (local_step, rival_local_step))
    full = full_step(**i).gather(1, i["ids"][..., None].expand(-1, -1, ours.shape[2]))
    limit = 1e-3 if ours.dtype == torch.float32 else 0.1
    for name, other in (("the published loop", rival), ("a full step", full)):
        assert (ours - other).abs().max() <= limit, f"a local step differs from {name}"


def flops(positions: int, batch: int) -> int:
    """Products of 24 layers over `positions` of 257, and of the output layer."""
    return batch * positions * (24 * (24 * 768**2 + 4 * 257 * 768) + 2 * 768 * 1024)


def generation_inputs(batch: int, dtype: torch.dtype, setting: tuple[int, int]) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        steps, first = setting
        counts = maskops.mask_schedule("pow", steps, 256, at_least_one=True)
        model = network(dtype)
        return {
            "reused": MaskedGenerator(model, counts, ReCAP(first)),
            "full": MaskedGenerator(model, counts),
            "batch": batch,
        }

    return inputs


def generate_reused(reused: MaskedGenerator, full: MaskedGenerator, batch: int, **_: Any) -> Tensor:
    return reused.generate(batch).tokens


def generate_full(reused: MaskedGenerator, full: MaskedGenerator, batch: int, **_: Any) -> Tensor:
    return full.generate(batch).tokens


def gate_generation(i: Inputs) -> None:
    assert generate_reused(**i).min() >= 0


def network_cases(dtype: torch.dtype) -> list[Case]:
    common = dict(mode="fwd", dtype=dtype, sets="one", kind="flops", rounds=10, quick=False)
    step = Case(
        "local step, 32 of 256 tokens, 24 x 768, batch 8", make=step_inputs(8, dtype), ours=local_step,
        rivals={"gather + cat + SDPA": rival_local_step, "full step": full_step}, gate=gate_step,
        work=lambda i: flops(33, 8), asked={"gather + cat + SDPA": 1.3, "full step": 257 / 33 / 1.15}, **common,
    )  # fmt: skip
    whole = [
        Case(
            f"generation {name}, 24 x 768, batch 8", make=generation_inputs(8, dtype, setting), ours=generate_reused,
            rivals={f"{setting[0]} full steps": generate_full}, gate=gate_generation,
            work=lambda i: flops(sum(s.positions for s in i["reused"].generate(1).trace), 8), asked={"best": asked},
            **{**common, "rounds": 3},
        )
        for name, setting, asked in (("8+8", (16, 0), 1.6), ("22+10", (32, 12), 1.39 / 1.12))
    ]  # fmt: skip
    return [step, *whole]


def cases() -> list[Case]:
    out = []
    for dtype in (torch.float32, HALF):
        for batch in (8, 1):
            quick = dtype == torch.float32
            out += [
                Case(
                    f"cached_attention ({batch},{H},{U} of {N},{D})", "fwd", dtype, local_inputs(batch, dtype), attend,
                    {"gather + cat + SDPA": gather_cat_sdpa}, work=attention_bytes, asked={"best": 1.3}, quick=quick,
                ),
                Case(
                    f"write + read ({batch},{H},{U} of {N},{D})", "fwd", dtype, local_inputs(batch, dtype), write_and_read,
                    {"index_put_": index_put, "cat and reorder": cat_and_reorder}, work=write_bytes, gate=gate_write,
                    asked={"cat and reorder": 3.0}, quick=quick,
                ),
            ]  # fmt: skip
        for batch, tokens, vocabulary in ((8, 256, 1024), (8, 1024, 32000)):
            big = vocabulary > 9999
            out.append(
                Case(
                    f"confidence_select ({batch},{tokens},{vocabulary})", "fwd", dtype, logits_of(batch, tokens, vocabulary, dtype),
                    choose, {"softmax + multinomial + topk": softmax_multinomial, "Gumbel argmax + topk": gumbel_argmax},
                    work=choice_bytes, gate=gate_choice, asked={"softmax + multinomial + topk": 4.0}, quick=not big and quick,
                    sets="one" if big else "rotate", rounds=20 if big else 400,
                )
            )  # fmt: skip
        out += network_cases(dtype)
    return out
