"""Rivals of masked_loss: losses that materialise targets or logits, as published, and as a careful user writes them.

A cross-entropy over a vocabulary is three products of 2 M V D flops (logits, and the gradients of hidden and weight), and a fourth
where the logits are made again instead of kept. `work` counts the three.
"""

from typing import Any

import torch
import torch.nn.functional as F
from _harness import Case, Inputs, as_tuple, peak_extra_bytes
from torch import Tensor

import maskops
from maskops import TokenSplit
from maskops.testing.masked_loss import TRAFFIC

IDIOM = "patchify, normalise, square, mask, mean"


def published(pred: Tensor, images: Tensor, mask: Tensor, patch: int, **_: Any) -> Tensor:
    """forward_loss of the published MAE with norm_pix_loss."""
    batch, channels, height, width = images.shape
    h, w = height // patch, width // patch
    target = images.reshape(batch, channels, h, patch, w, patch)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(batch, h * w, patch**2 * channels)
    mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def gather_first(pred: Tensor, images: Tensor, mask: Tensor, patch: int, split: TokenSplit, **_: Any) -> Tensor:
    """What a careful user writes: only the masked patches of both are gathered, normalised and compared."""
    batch, channels, height, width = images.shape
    target = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    target = target.permute(0, 2, 4, 3, 5, 1).reshape(batch, pred.shape[1], -1)
    ids = split.ids_mask[:, :, None].expand(-1, -1, target.shape[2])
    target, pred = torch.gather(target, 1, ids), torch.gather(pred, 1, ids)
    var, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return (pred - (target - mean) * (var + 1.0e-6).rsqrt()).square().mean()


def ours(pred: Tensor, images: Tensor, patch: int, split: TokenSplit, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.masked_patch_loss(pred, images, split, patch, backend=backend)


def make(batch: int, size: int, patch: int, dtype: torch.dtype, channels: int = 3) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        tokens = (size // patch) ** 2
        split = maskops.random_masking(batch, tokens, 0.75, seed=seed, device=device)
        images = torch.randn(batch, channels, size, size, generator=g).to(device, dtype)
        pred = torch.randn(batch, tokens, channels * patch**2, generator=g).to(device, dtype)
        return {
            "pred": pred, "images": images, "mask": split.mask.to(dtype), "patch": patch, "split": split,
            "grad_out": torch.ones((), device=device, dtype=dtype),
        }  # fmt: skip

    return inputs


def work(inputs: Inputs) -> int:
    pred, images, split = inputs["pred"], inputs["images"], inputs["split"]
    rows = split.ids_restore, split.num_keep, split.num_mask, [inputs["patch"]] * 2, True, "l2", 1.0, "masked"
    forward = TRAFFIC["masked_loss_patch"](pred, images, *rows)
    return forward + TRAFFIC["_masked_loss_patch_backward"](None, pred, images, None, *rows)


def cases() -> list[Case]:
    sizes = [
        (64, 224, 16, torch.float32, True), (64, 224, 16, torch.bfloat16, False), (8, 224, 16, torch.float32, False),
        (1, 224, 16, torch.float32, False), (64, 224, 14, torch.float32, False), (5, 208, 8, torch.float32, False),
    ]  # fmt: skip
    out = []
    for batch, size, patch, dtype, headline in sizes:
        # The loss of a half-precision prediction is float32 here, so its gradient is too; the idiom keeps bfloat16.
        rivals = {IDIOM: in_loss_dtype(published), "gather masked patches first": in_loss_dtype(gather_first)}
        out.append(
            Case(
                f"masked_patch_loss batch {batch}, {size}/{patch}", mode="fwd+bwd", dtype=dtype,
                make=in_float_grad(make(batch, size, patch, dtype)), ours=ours, rivals=rivals, grads=("pred",),
                compiled=tuple(rivals) if headline else (), work=work, quick=headline,
                asked={IDIOM: 4.0, "compiled": 1.5} if headline else {},
            )
        )  # fmt: skip
    return out + text_cases() + row_cases()


def in_loss_dtype(forward: Any) -> Any:
    return lambda **inputs: forward(**inputs).float() if inputs["pred"].dtype != torch.float64 else forward(**inputs)


def in_float_grad(make_inputs: Any) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        made = make_inputs(device, seed)
        return {**made, "grad_out": made["grad_out"].float()}

    return inputs


# ---------------------------------------------------------------- gates and memory

CUT = "cut-cross-entropy (torch_compile)"
try:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
except ImportError:
    cut_cross_entropy = None
ABSENT = {} if cut_cross_entropy else {CUT: "not installed (pip install cut-cross-entropy)"}


def leaves_of(inputs: Inputs, grads: tuple[str, ...]) -> Inputs:
    return {n: v.detach().requires_grad_() if n in grads else v for n, v in inputs.items() if n != "grad_out"}


def gate_of(mine: Any, rival: Any, grads: tuple[str, ...], limit: float) -> Any:
    """Ours against a rival in value and gradients: a float64 reference of all logits would not fit."""

    def gate(inputs: Inputs) -> None:
        results = []
        for forward in (mine, rival):
            leaves = leaves_of(inputs, grads)
            out = as_tuple(forward(**leaves))[0]
            results.append((out.detach(), *torch.autograd.grad(out, [leaves[n] for n in grads], inputs["grad_out"])))
        for a, b in zip(*results, strict=True):
            off = (
                ((a.double() - b.double()).square().mean() / b.double().square().mean().clamp(min=1e-30)).sqrt().item()
            )
            assert off <= limit, f"off by {off:.2e} (RMS)"

    return gate


def memory_of(mine: Any, rivals: dict[str, Any], grads: tuple[str, ...]) -> Any:
    """Resident memory that a call adds at its peak, beyond its gradients."""

    def after(inputs: Inputs) -> dict[str, Any]:
        leaves = leaves_of(inputs, grads)
        own = sum(leaves[n].numel() * leaves[n].element_size() for n in grads)

        def extra(forward: Any) -> float:
            call = lambda: torch.autograd.grad(forward(**leaves), [leaves[n] for n in grads], inputs["grad_out"])  # noqa: E731
            return round((peak_extra_bytes(call) - own) / 2**20, 1)

        return {"extra_mib": {"ours": extra(mine)} | {name: extra(forward) for name, forward in rivals.items()}}

    return after


# ---------------------------------------------------------------- linear cross-entropy


def ours_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor, backend: str = "auto", **_: Any
) -> Tensor:
    return maskops.linear_cross_entropy(hidden, weight, target, mask=mask, bias=bias, backend=backend)


def all_logits(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor, **_: Any) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits, torch.where(mask, target, -100)).float()


def gathered_logits(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden[mask], weight, bias), target[mask]).float()


def torch_fused(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor, **_: Any) -> Tensor:
    return F.linear_cross_entropy(hidden[mask], weight, target[mask], linear_bias=bias).float()


def torch_chunked(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor, **_: Any) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden[mask], weight, target[mask], linear_bias=bias, options=options).float()


def cut_compiled(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor, **_: Any) -> Tensor:
    """It skips ignored targets itself, and takes no bias: 0 here."""
    target = torch.where(mask, target, -100)
    return cut_cross_entropy(hidden, weight, target, impl="torch_compile").float() + 0 * bias.sum()


def make_linear(rows: int, width: int, classes: int, share: float, dtype: torch.dtype) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        made = {
            "hidden": torch.randn(rows, width, generator=g).to(dtype),
            "weight": (torch.randn(classes, width, generator=g) * 0.02).to(dtype), "bias": torch.zeros(classes, dtype=dtype),
            "target": torch.randint(classes, (rows,), generator=g), "mask": torch.rand(rows, generator=g) < share,
            "grad_out": torch.ones(()),
        }  # fmt: skip
        return {name: x.to(device) for name, x in made.items()}

    return inputs


def linear_flops(inputs: Inputs) -> int:
    return 6 * int(inputs["mask"].sum()) * inputs["weight"].numel()


def sampled(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor, backend: str = "auto", **_: Any
) -> Tensor:
    return maskops.linear_sample(hidden, weight, target, mask=mask, bias=bias, seed=1, backend=backend)[0]


def sampled_logits(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor, **_: Any) -> Tensor:
    """The generator of ELECTRA on gathered rows."""
    logits = F.linear(hidden[mask], weight, bias)
    noise = -torch.log(-torch.log(torch.rand_like(logits, dtype=torch.float32).clamp(1e-9, 1 - 1e-7)))
    (logits.detach() + noise).argmax(1)
    return F.cross_entropy(logits, target[mask]).float()


def text_cases() -> list[Case]:
    grads, out = ("hidden", "weight", "bias"), []
    rivals = {
        "gather first": gathered_logits, "F.linear_cross_entropy": torch_fused, "F.linear_cross_entropy, chunked": torch_chunked,
    } | ({CUT: cut_compiled} if cut_cross_entropy else {})  # fmt: skip
    sizes = [
        ("15% of (32, 128), V 30522", 4096, 768, 30522, 0.15, torch.float32, {"logits of all": all_logits}, True),
        ("15% of (32, 128), V 30522", 4096, 768, 30522, 0.15, torch.bfloat16, {"logits of all": all_logits}, False),
        ("all of 2048, V 128256", 2048, 768, 128256, 1.1, torch.float32, {}, False),
    ]  # fmt: skip
    for name, rows, width, classes, share, dtype, more, quick in sizes:
        asked = {"logits of all": 5.0, "gather first": 1.3} if more else {"gather first": 1.2}
        others = more | rivals
        limit = 1e-4 if dtype == torch.float32 else 3e-2
        out.append(
            Case(
                f"linear_cross_entropy {name}, D {width}", mode="fwd+bwd", dtype=dtype,
                make=make_linear(rows, width, classes, share, dtype), ours=ours_linear, rivals=others, absent=ABSENT, grads=grads,
                work=linear_flops, kind="flops", asked=asked, gate=gate_of(ours_linear, gathered_logits, grads, limit),
                quick=quick, sets="one", rounds=12,
                after=memory_of(ours_linear, {"gather first": gathered_logits}, grads), apart=True,
            )
        )  # fmt: skip
    out.append(
        Case(
            "linear_sample 15% of (32, 128), V 30522, D 768", mode="fwd+bwd", dtype=torch.float32,
            make=make_linear(4096, 768, 30522, 0.15, torch.float32), ours=sampled,
            rivals={"gather, logits, Gumbel": sampled_logits}, grads=grads, work=linear_flops, kind="flops",
            gate=gate_of(sampled, sampled_logits, grads, 1e-4), quick=False, sets="one", rounds=12,
        )
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- losses over rows


def ours_contrast(
    query: Tensor, keys: Tensor, positives: Tensor, negatives: Tensor, backend: str = "auto", **_: Any
) -> Tensor:
    return maskops.contrastive_loss(query, keys, positives, negatives, 0.1, backend=backend)


def gathered_contrast(query: Tensor, keys: Tensor, positives: Tensor, negatives: Tensor, **_: Any) -> Tensor:
    """compute_preds of wav2vec 2.0."""
    targets = torch.cat([keys[positives][:, None], keys[negatives]], 1)
    equal = (targets[:, :1] == targets[:, 1:]).all(-1)
    logits = F.cosine_similarity(query[:, None], targets, dim=-1) / 0.1
    logits = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(equal, -torch.inf)], 1)
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def make_contrast(device: torch.device, seed: int) -> Inputs:
    """8 utterances of 200 masked frames; each has 100 distractors of its own utterance."""
    g = torch.Generator().manual_seed(seed)
    frames = torch.arange(1600)
    inside = torch.randint(199, (1600, 100), generator=g)
    inside += inside >= (frames % 200)[:, None]
    made = {
        "query": torch.randn(1600, 256, generator=g), "keys": torch.randn(1600, 256, generator=g), "positives": frames,
        "negatives": frames[:, None] // 200 * 200 + inside, "grad_out": torch.ones(()),
    }  # fmt: skip
    return {name: x.to(device) for name, x in made.items()}


def ours_pool(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.linear_max_pool(hidden, weight, bias, mask, backend=backend)


def pooled_logits(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, **_: Any) -> Tensor:
    return F.linear(hidden, weight, bias).masked_fill(~mask[..., None], -1000).amax(1)


def make_pool(device: torch.device, seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    made = {
        "hidden": torch.randn(32, 64, 768, generator=g), "weight": torch.randn(30522, 768, generator=g) * 0.02,
        "bias": torch.zeros(30522), "mask": torch.rand(32, 64, generator=g) < 0.9, "grad_out": torch.ones(32, 30522),
    }  # fmt: skip
    return {name: x.to(device) for name, x in made.items()}


def ours_regression(pred: Tensor, target: Tensor, mask: Tensor, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.masked_regression(pred, target, mask, "smooth_l1", True, backend=backend)


def written_regression(pred: Tensor, target: Tensor, mask: Tensor, **_: Any) -> Tensor:
    """data2vec: the masked rows of both, a layer norm of the target."""
    target = F.layer_norm(target[mask], target.shape[-1:])
    return F.smooth_l1_loss(pred[mask], target)


def make_regression(device: torch.device, seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    made = {
        "pred": torch.randn(64, 196, 768, generator=g), "target": torch.randn(64, 196, 768, generator=g),
        "mask": torch.rand(64, 196, generator=g) < 0.6, "grad_out": torch.ones(()),
    }  # fmt: skip
    return {name: x.to(device) for name, x in made.items()}


def row_cases() -> list[Case]:
    keys, pool = ("query", "keys"), ("hidden", "weight", "bias")
    return [
        Case(
            "contrastive_loss (8, 200), 100 distractors, D 256", mode="fwd+bwd", dtype=torch.float32, make=make_contrast,
            ours=ours_contrast, rivals={"gather, cosine, CE": gathered_contrast}, grads=keys, asked={"gather, cosine, CE": 3.0},
            sets="one", after=memory_of(ours_contrast, {"gather, cosine, CE": gathered_contrast}, keys), apart=True,
        ),
        Case(
            "linear_max_pool (32, 64), V 30522, D 768", mode="fwd+bwd", dtype=torch.float32, make=make_pool, ours=ours_pool,
            rivals={"logits, masked_fill, amax": pooled_logits}, grads=pool,
            # Of a million maxima one or two are nearly ties, and either token may take the gradient: 1e-3 for each.
            gate=gate_of(ours_pool, pooled_logits, pool, 5e-3), quick=False, sets="one", rounds=12,
        ),
        Case(
            "masked_regression (64, 196, 768), smooth_l1, layer norm", mode="fwd+bwd", dtype=torch.float32, make=make_regression,
            ours=ours_regression, rivals={"gather, layer norm, smooth_l1": written_regression}, grads=("pred",),
            gate=gate_of(ours_regression, written_regression, ("pred",), 1e-4),
        ),
    ]  # fmt: skip
