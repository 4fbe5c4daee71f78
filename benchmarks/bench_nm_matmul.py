"""Rivals of nm_matmul: dense products, masks multiplied in, sparse CSR, and what a mask learner writes in PyTorch."""

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Case, Inputs, Row, peak_extra_bytes
from torch import Tensor

import maskops
from maskops import NMWeight
from maskops.testing import assert_close, in_float64
from maskops.testing.nm_matmul import TRAFFIC

DENSE, MULTIPLIED, CSR = "F.linear dense", "F.linear(x, w * mask)", "sparse CSR (MKL)"
BMM, COMPOSED = "bmm, masks materialised", "gumbel softmax, w * mask, F.linear"
SIZES = [(1536, 768, 3072), (512, 4096, 4096)]  # M, K, N
DEEPSPARSE = "MASKOPS_DEEPSPARSE_PYTHON"

# ---------------------------------------------------------------- a compressed weight


def make_linear(M: int, K: int, N: int, n: int, m: int, dtype: torch.dtype) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        dense = torch.randn(N, K, generator=g)
        mask = maskops.nm_mask(dense.abs(), n, m)
        dense = torch.where(mask, dense, 0).to(device, dtype)
        weight = maskops.nm_compress(dense, n, m)
        made = {
            "x": torch.randn(M, K, generator=g).to(device, dtype),
            "values": weight.values,
            "indices": weight.indices,
        }
        made |= {"dense": dense, "mask": mask.to(device, dtype), "n": n, "m": m}
        if dtype == torch.float32 and device.type == "cpu":
            made["csr"] = dense.to_sparse_csr()
        return made

    return inputs


def linear(x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.nm_linear(x, NMWeight(values, indices, n, m, x.shape[1]), backend=backend)


def dense_linear(x: Tensor, dense: Tensor, **_: Any) -> Tensor:
    return F.linear(x, dense)


def multiplied_linear(x: Tensor, dense: Tensor, mask: Tensor, **_: Any) -> Tensor:
    return F.linear(x, dense * mask)


def csr_linear(x: Tensor, csr: Tensor, **_: Any) -> Tensor:
    return (csr @ x.T).T


def kept_flops(inputs: Inputs) -> int:
    """Two per kept weight and row of x: the zeros do not count."""
    return 2 * inputs["x"].shape[0] * inputs["values"].numel()


def read_bytes(inputs: Inputs) -> int:
    return TRAFFIC["nm_matmul_linear"](
        *(inputs[name] for name in ("x", "values", "indices")), None, inputs["n"], inputs["m"]
    )


def deepsparse(M: int, K: int, N: int, n: int, m: int, inputs: Inputs) -> Row:
    """DeepSparse's time of the same job, measured in its own process and environment right after ours."""
    python = os.environ.get(DEEPSPARSE)
    if not python:
        return {"separate": {"DeepSparse": f"not measured: {DEEPSPARSE} names no interpreter (see benchmarks/rivals)"}}
    script = Path(__file__).parent / "rivals" / "deepsparse_linear.py"
    command = [python, str(script), *map(str, (M, K, N, n, m)), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"separate": {"DeepSparse": f"failed: {done.stderr.strip().splitlines()[-1]}"}}
    return {"separate": {"DeepSparse": json.loads(done.stdout.strip().splitlines()[-1])}}


def linear_cases() -> list[Case]:
    out = []
    for size in SIZES:
        for n, m, least in ((2, 4, 3.5), (1, 4, 6.0), (2, 8, 6.0), (4, 8, 3.5)):
            rivals = {DENSE: dense_linear, MULTIPLIED: multiplied_linear, CSR: csr_linear}
            head = (n, m) == (2, 4)
            out.append(
                Case(
                    f"nm_linear {n}:{m} {size}", "fwd", torch.float32, make_linear(*size, n, m, torch.float32), linear, rivals,
                    work=kept_flops, kind="flops", asked={DENSE: least} if (n, m) != (4, 8) else {}, quick=head, sets="one",
                    after=partial(deepsparse, *size, n, m), rounds=40,
                )
            )  # fmt: skip
        out.append(
            Case(
                f"nm_linear 2:4 {size}", "fwd", torch.bfloat16, make_linear(*size, 2, 4, torch.bfloat16), linear,
                {DENSE: dense_linear, MULTIPLIED: multiplied_linear}, work=kept_flops, kind="flops", asked={DENSE: 1.4}, sets="one",
                rounds=40,
            )
        )  # fmt: skip
    for M in (1, 4, 16, 32):
        for dtype in (torch.float32, torch.bfloat16):
            out.append(
                Case(
                    f"nm_linear 2:4 {(M, 4096, 4096)}", "fwd", dtype, make_linear(M, 4096, 4096, 2, 4, dtype), linear,
                    {DENSE: dense_linear}, work=read_bytes, asked={DENSE: 1.7} if M < 32 else {}, quick=M == 1,
                )
            )  # fmt: skip
    return out


# ---------------------------------------------------------------- a training step on a compressed weight


def gradients(y: Tensor, grad_out: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    return y.detach(), *torch.autograd.grad(y, wanted, grad_out)


def train_sparse(
    values: Tensor, x: Tensor, grad_out: Tensor, backend: str = "auto", **inputs: Any
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x, values = x.detach().requires_grad_(), values.detach().requires_grad_()
        return gradients(linear(x, values, backend=backend, **inputs), grad_out, x, values)


def train_dense(dense: Tensor, x: Tensor, grad_out: Tensor, mask: Tensor, times: bool, **_: Any) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x, dense = x.detach().requires_grad_(), dense.detach().requires_grad_()
        return gradients(F.linear(x, dense * mask if times else dense), grad_out, x, dense)


def train_gate(inputs: Inputs) -> None:
    exact = train_sparse(**dict(zip(inputs, in_float64(tuple(inputs.values())), strict=True)), backend="reference")
    reference = train_sparse(**inputs, backend="reference")
    for what, a, e, r in zip(("y", "grad_x", "grad_values"), train_sparse(**inputs), exact, reference, strict=True):
        assert_close(a, e, r, what)


def train_cases() -> list[Case]:
    def inputs(size: tuple[int, ...], device: torch.device, seed: int) -> Inputs:
        made = make_linear(*size, 2, 4, torch.float32)(device, seed)
        made.pop("csr", None)
        return {**made, "grad_out": torch.randn(size[0], size[2], device=device)}

    rivals = {DENSE: partial(train_dense, times=False), MULTIPLIED: partial(train_dense, times=True)}
    return [
        Case(
            f"training step, nm_linear 2:4 {size}", "fwd+bwd", torch.float32, partial(inputs, size), train_sparse, rivals,
            work=lambda i: 3 * kept_flops(i), kind="flops", asked={DENSE: 2.0}, gate=train_gate, quick=size == SIZES[0], sets="one",
            rounds=30,
        )
        for size in SIZES
    ]  # fmt: skip


# ---------------------------------------------------------------- a learnable mask


def make_soft(M: int, K: int, N: int, n: int, m: int, device: torch.device, seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    patterns = maskops.nm_patterns(n, m)
    return {
        "x": torch.randn(M, K, generator=g).to(device), "weight": torch.randn(N, K, generator=g).to(device),
        "logits": torch.randn(N, K // m, len(patterns), generator=g).to(device),
        "patterns": patterns.to(device, torch.float32), "grad_out": torch.randn(M, N, generator=g).to(device), "n": n, "m": m,
    }  # fmt: skip


def soft(
    x: Tensor, weight: Tensor, logits: Tensor, grad_out: Tensor, n: int, m: int, backend: str = "auto", **_: Any
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x, logits = x.detach().requires_grad_(), logits.detach().requires_grad_()
        out = maskops.nm_soft_linear(x, weight, logits, n, m, tau=1.0, scale=1.0, seed=0, backend=backend)
        return gradients(out.y, grad_out, x, logits)


def soft_composed(
    x: Tensor, weight: Tensor, logits: Tensor, patterns: Tensor, grad_out: Tensor, **_: Any
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x, logits = x.detach().requires_grad_(), logits.detach().requires_grad_()
        mask = F.gumbel_softmax(logits, tau=1.0) @ patterns
        return gradients(F.linear(x, weight * mask.view_as(weight)), grad_out, x, logits)


def soft_gate(inputs: Inputs) -> None:
    exact = soft(**dict(zip(inputs, in_float64(tuple(inputs.values())), strict=True)), backend="reference")
    reference = soft(**inputs, backend="reference")
    for what, a, e, r in zip(("y", "grad_x", "grad_logits"), soft(**inputs), exact, reference, strict=True):
        assert_close(a, e, r, what)


def memory_of(ours: Any, rival: Any, name: str, inputs: Inputs) -> Row:
    """Most memory beyond inputs during one call, ours and the rival's."""
    mine, theirs = peak_extra_bytes(lambda: ours(**inputs)), peak_extra_bytes(lambda: rival(**inputs))
    return {"extra_bytes": {"ours": mine, name: theirs}, "extra_share": mine / max(1, theirs)}


def soft_cases() -> list[Case]:
    out = []
    for size, n, m in (
        ((2048, 768, 768), 2, 4),
        ((2048, 768, 3072), 2, 4),
        ((2048, 768, 768), 1, 4),
        ((2048, 768, 768), 4, 8),
    ):
        head = size == (2048, 768, 768) and (n, m) == (2, 4)
        out.append(
            Case(
                f"nm_soft_linear {n}:{m} {size}", "fwd+bwd", torch.float32, partial(make_soft, *size, n, m), soft,
                {COMPOSED: soft_composed}, asked={COMPOSED: 2.0} if head else {}, gate=soft_gate, quick=head, sets="one",
                after=partial(memory_of, soft, soft_composed, COMPOSED), apart=True, rounds=40,
            )
        )  # fmt: skip
    return out


# ---------------------------------------------------------------- masks of bits


def make_bits(S: int, M: int, K: int, N: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(S, N, K, generator=g) < 0.9
    return {
        "x": torch.randn(S, M, K, generator=g).to(device, dtype), "weight": torch.randn(N, K, generator=g).to(device, dtype),
        "bits": maskops.pack_bitmask(mask).to(device), "mask": mask.to(device, dtype),
    }  # fmt: skip


def bits_linear(x: Tensor, weight: Tensor, bits: Tensor, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.bitmask_linear(x, weight, bits, backend=backend)


def bits_bmm(x: Tensor, weight: Tensor, mask: Tensor, **_: Any) -> Tensor:
    return torch.bmm(x, (weight * mask).transpose(1, 2))


def bits_cases() -> list[Case]:
    out = []
    for size in ((8, 256, 1280, 1280), (8, 1024, 640, 640), (8, 64, 1280, 1280)):
        head = size == (8, 64, 1280, 1280)
        for dtype in (torch.float32, torch.bfloat16) if head else (torch.float32,):
            out.append(
                Case(
                    f"bitmask_linear, mask per sample {size}", "fwd", dtype, partial(make_bits, *size, dtype), bits_linear,
                    {BMM: bits_bmm}, asked={BMM: 3.0}, quick=head, sets="one", kind="flops",
                    work=lambda i: 2 * i["x"].numel() * i["weight"].shape[0],
                    after=partial(memory_of, bits_linear, bits_bmm, BMM), apart=True, rounds=60,
                )
            )  # fmt: skip
    return out


# ---------------------------------------------------------------- masks


def mask_cases() -> list[Case]:
    def inputs(device: torch.device, seed: int) -> Inputs:
        return {"scores": torch.rand(4096, 4096, generator=torch.Generator().manual_seed(seed)).to(device)}

    def ours(scores: Tensor, backend: str = "auto") -> Tensor:
        return maskops.nm_mask(scores, 2, 4, backend=backend)

    def topk(scores: Tensor) -> Tensor:
        groups = scores.view(-1, 4)
        kept = groups.topk(2, dim=1, sorted=False).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True).view_as(scores)

    def gate(made: Inputs) -> None:
        # Of equal scores either may stay: what stays is compared by value.
        kept = [torch.where(mask(**made), made["scores"], -1).view(-1, 4).sort(1).values for mask in (ours, topk)]
        assert torch.equal(*kept), "the kept scores differ"

    return [
        Case("nm_mask 2:4 (4096, 4096)", "fwd", torch.float32, inputs, ours, {"topk, scatter": topk}, gate=gate, quick=False,
             work=lambda i: TRAFFIC["nm_matmul_mask"](i["scores"], 2, 4), rounds=40),
    ]  # fmt: skip


def cases() -> list[Case]:
    return linear_cases() + train_cases() + soft_cases() + bits_cases() + mask_cases()
