"""A whole pre-training step of MAE: maskops.models.mae against Hugging Face's ViTMAEForPreTraining, same weights, same noise.

A step is forward, backward and AdamW. The breakdown comes from torch.profiler: self CPU time of the operators of one step.
"""

import contextlib
import importlib.util
import sys
from typing import Any

import torch
from _harness import Case, Inputs
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from maskops.models.mae import MAE

HF = "Hugging Face ViTMAE"
REASON = "transformers is not installed (pip install transformers)"

# First match wins; the profiler's names of operators contain these.
PARTS = (
    ("our ops", ("maskops::",)),
    ("attention", ("attention", "flash")),
    ("optimiser", ("_foreach", "_fused_adam", "Optimizer")),
    ("GEMM", ("mm", "linear", "conv", "bmm", "mkldnn")),
    ("norm and activation", ("layer_norm", "gelu", "softmax")),
    ("mask, gather, cat, loss", ("sort", "gather", "scatter", "cat", "rand", "pow", "mean", "var", "index", "repeat")),
)
OTHER = "copies, additions, other"


def make(batch: int, dtype: torch.dtype, **sizes: int) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        torch.manual_seed(seed)
        config = ViTMAEConfig(norm_pix_loss=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
        theirs = ViTMAEForPreTraining(config).to(device).train()
        ours = MAE.from_hf(theirs).train()
        made: Inputs = {
            "images": torch.randn(batch, 3, config.image_size, config.image_size, device=device),
            "dtype": dtype,
        }
        made["noise"] = torch.rand(batch, (config.image_size // config.patch_size) ** 2, device=device)
        for name, model in (("ours", ours), ("theirs", theirs)):
            trained = [p for p in model.parameters() if p.requires_grad]
            # lr 0: the optimiser does all its work and both models keep the same weights.
            made[name] = model, torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
        return made

    return inputs


def autocast(images: Tensor, dtype: torch.dtype) -> Any:
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(images.device.type, dtype)


def our_loss(images: Tensor, noise: Tensor, ours: tuple, dtype: torch.dtype, **_: Any) -> Tensor:
    with autocast(images, dtype):
        return ours[0](images, noise).loss


def their_loss(images: Tensor, noise: Tensor, theirs: tuple, dtype: torch.dtype, **_: Any) -> Tensor:
    with autocast(images, dtype):
        return theirs[0](images, noise=noise).loss


def train(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    with torch.enable_grad():
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def our_step(ours: tuple, **inputs: Any) -> Tensor:
    inputs.pop("backend", None)
    with torch.enable_grad():
        return train(our_loss(ours=ours, **inputs), ours[1])


def their_step(theirs: tuple, **inputs: Any) -> Tensor:
    with torch.enable_grad():
        return train(their_loss(theirs=theirs, **inputs), theirs[1])


def gate(inputs: Inputs) -> None:
    """Loss and the gradient of every weight, as both models name it, agree."""
    with torch.enable_grad():
        losses = {"ours": our_loss(**inputs), "theirs": their_loss(**inputs)}
        for loss in losses.values():
            loss.backward()
    exact = inputs["dtype"] == torch.float32
    off = abs(losses["ours"].item() - losses["theirs"].item()) / abs(losses["theirs"].item())
    assert off <= (1e-5 if exact else 2e-2), f"losses differ by {off:.1e}"
    norms = {name: gradient_norm(inputs[name][0]) for name in ("ours", "theirs")}
    off = abs(norms["ours"] - norms["theirs"]) / norms["theirs"]
    assert off <= (1e-4 if exact else 5e-2), f"norms of the gradients differ by {off:.1e}"
    for name in ("ours", "theirs"):
        inputs[name][1].zero_grad()


def gradient_norm(model: nn.Module) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.stack([g.double().norm() for g in grads]).norm().item()


# ---------------------------------------------------------------- where the time goes


def breakdown(inputs: Inputs) -> dict[str, Any]:
    return {"breakdown": {"ours": parts_of(our_step, inputs), HF: parts_of(their_step, inputs)}}


def parts_of(step: Any, inputs: Inputs) -> dict[str, float]:
    """Part -> milliseconds of self time of one step."""
    step(**inputs)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(**inputs)
    times = dict.fromkeys([*(name for name, _ in PARTS), OTHER], 0.0)
    for event in profiler.key_averages():
        part = next((name for name, words in PARTS if any(word in event.key for word in words)), OTHER)
        times[part] += event.self_cpu_time_total / 1e3
    return times


def cases() -> list[Case]:
    large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    # Batch 4 is what --quick has time for.
    sizes = [("MAE-Base", 4, {}), ("MAE-Base", 8, {}), ("MAE-Large", 2, large)]
    if importlib.util.find_spec("transformers") is None:
        print(f"mae_step is not measured: {REASON}", file=sys.stderr)
        return []
    out = []
    for name, batch, size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            out.append(
                Case(
                    f"pre-training step {name}, 224/16, batch {batch}", mode="fwd+bwd", dtype=dtype,
                    make=make(batch, dtype, **size),
                    ours=our_step, rivals={HF: their_step}, gate=gate, after=breakdown,
                    sets="one", quick=batch == 4 and dtype == torch.float32, rounds=12,
                )
            )  # fmt: skip
    return out
