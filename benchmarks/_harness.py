"""Timing shared by all benchmarks: what a case is, the gate it must pass, and how contenders are measured against each other.

A case is measured only after its results agree with the float64 reference and the rivals agree with them. All contenders run
interleaved in one process on the same inputs, so that a busy machine slows all of them alike.
"""

import ctypes
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskops.testing import assert_close, in_float64

Inputs = dict[str, Any]
Row = dict[str, Any]
Forward = Callable[..., Any]

# How far a rival may be off, root mean square relative to the expected values, before it counts as computing something else.
RIVAL_RMS = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 4e-3}
COLD_BYTES = 160 << 20  # input sets that are rotated together exceed every last-level cache we know of
MIN_COLD_BYTES = 4 << 20  # smaller cases live in the caches anyway


@dataclass(frozen=True)
class Case:
    """One job and its contenders.

    Args:
        name: printed and filtered by --case.
        mode: "fwd", "fwd+bwd" or "build".
        dtype: of the floating inputs.
        make: (device, seed) -> the forward functions' keyword arguments; for fwd+bwd also "grad_out".
        ours: the forward function, which also takes backend=; returns a tensor or a tuple of tensors.
        rivals: name -> forward function with the same keyword arguments.
        compiled: names of the rivals that torch.compile gets as well.
        absent: name -> the reason why a rival is not measured.
        grads: arguments that the backward pass gives gradients of.
        work: inputs -> least bytes, or flops, of the job; kind says which.
        asked: rival name, "best", "eager" or "compiled" -> the least ratio that the project asks for.
        gate: instead of the comparison with the reference: raises AssertionError if results are wrong.
        quick: measured in a --quick run.
        sets: "rotate" also measures the case out of cache; "one" does not.
        after: (inputs) -> more fields of the row; left out by --quick.
        apart: after is called in a process of its own, on the CPU only: the memory that a call adds depends on what the heap holds.
        rounds: at most so many rounds.
    """

    name: str
    mode: str
    dtype: torch.dtype
    make: Callable[[torch.device, int], Inputs]
    ours: Forward
    rivals: dict[str, Forward]
    compiled: tuple[str, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    grads: tuple[str, ...] = ()
    work: Callable[[Inputs], int] | None = None
    kind: str = "bytes"
    asked: dict[str, float] = field(default_factory=dict)
    gate: Callable[[Inputs], None] | None = None
    quick: bool = True
    sets: str = "rotate"
    after: Callable[[Inputs], dict[str, Any]] | None = None
    apart: bool = False
    rounds: int = 400


# ---------------------------------------------------------------- running one contender


def runner(case: Case, forward: Forward) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The timed call: forward without a graph, or forward and backward with the given output gradient."""

    def only_forward(inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(forward(**inputs))

    def with_backward(inputs: Inputs) -> tuple[Tensor, ...]:
        arguments = {name: value for name, value in inputs.items() if name != "grad_out"}
        out = forward(**arguments)
        return out.detach(), *torch.autograd.grad(out, [inputs[name] for name in case.grads], inputs["grad_out"])

    return with_backward if case.grads else only_forward


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def prepared(case: Case, inputs: Inputs) -> Inputs:
    """The inputs with the leaves of the backward pass marked."""
    return {n: v.detach().requires_grad_() if n in case.grads else v for n, v in inputs.items()}


# ---------------------------------------------------------------- the gate


def check_case(case: Case, inputs: Inputs, contenders: dict[str, Forward]) -> None:
    """AssertionError unless ours is right in value and gradient, and every rival computes the same."""
    if case.gate is not None:
        return case.gate(inputs)
    wide = prepared(case, dict(zip(inputs, in_float64(tuple(inputs.values())), strict=True)))
    exact = runner(case, lambda **kw: case.ours(**kw, backend="reference"))(wide)
    reference = runner(case, lambda **kw: case.ours(**kw, backend="reference"))(inputs)
    results = ("result", *(f"grad_{name}" for name in case.grads))
    for what, a, e, r in zip(results, runner(case, case.ours)(inputs), exact, reference, strict=True):
        assert_close(a, e, r, f"{case.name}: {what}")
    for rival, forward in contenders.items():
        for what, a, e in zip(results, runner(case, forward)(inputs), exact, strict=True):
            assert a.shape == e.shape, f"{rival}: {what} has shape {list(a.shape)}, expected {list(e.shape)}"
            off = ((a.double() - e).square().mean() / e.square().mean().clamp(min=1e-30)).sqrt().item()
            assert off <= RIVAL_RMS[case.dtype], f"{rival}: {what} is off by {off:.2e} (RMS), so it is another job"


# ---------------------------------------------------------------- timing


@dataclass
class Timer:
    """Wall time on the CPU; CUDA events behind a flush of the L2 cache on a GPU."""

    device: torch.device
    flush: Tensor | None = None

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)

    def milliseconds(self, call: Callable[[], object], *, cold: bool) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        if cold and self.flush is not None:
            self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def interleaved(
    calls: dict[str, Callable[[Inputs], object]],
    sets: list[Inputs],
    timer: Timer,
    seconds: float,
    least: int,
    most: int,
) -> tuple[dict[str, list[float]], int]:
    """Milliseconds of every call, round by round, the order rotated; and the page faults of ours per call.

    Measuring ends after `seconds`, but not before `least` rounds and not after `most`.
    With one input set each timed call follows an untimed one, or four of less than a millisecond, so that what fits is cached and
    the pool's threads are awake. With several no input is reused before all the others were read.
    """
    names, cold = list(calls), len(sets) > 1
    times: dict[str, list[float]] = {name: [] for name in names}
    faults: list[int] = []
    began, turn, done = time.perf_counter(), 0, 0
    while done < most and (time.perf_counter() - began < seconds or done < min(least, most)):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            inputs, turn = sets[turn % len(sets)], turn + 1
            if not cold and done == 0:
                calls[name](inputs)
            if not cold and len(names) > 1 and times[name] and times[name][-1] < 100:
                for _ in range(4 if times[name][-1] < 1 else 1):
                    calls[name](inputs)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            times[name].append(timer.milliseconds(lambda name=name, inputs=inputs: calls[name](inputs), cold=cold))
            if name == names[0]:
                faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        done += 1
    return times, sorted(faults)[len(faults) // 2]


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20%, median, 80%."""
    ordered = sorted(times)
    return tuple(ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in (0.2, 0.5, 0.8))


def cold_sets(case: Case, device: torch.device, inputs: Inputs) -> int:
    """How many input sets leave the caches; 1 if the case is too small to care."""
    size = sum(t.numel() * t.element_size() for t in inputs.values() if isinstance(t, Tensor))
    if case.sets == "one" or size < MIN_COLD_BYTES:
        return 1
    return max(2, -(-COLD_BYTES // size))


# ---------------------------------------------------------------- memory of results

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_pages() -> bool:
    """Let malloc keep freed memory from here on: results then reuse mapped pages, as with a caching allocator.

    Without it glibc returns every large result to the system, and each call pays the page faults of a fresh one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def return_pages() -> None:
    """malloc's defaults again."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 65536)
    mallopt(_M_MMAP_THRESHOLD, 128 << 10)
    mallopt(_M_TRIM_THRESHOLD, 128 << 10)


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """By how much the resident memory of this process grows at most during a call. Linux only."""
    libc, status = ctypes.CDLL(None), Path("/proc/self/status")

    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text()).group(1))

    libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)  # every large block comes fresh from the system and is seen
    call()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = kilobytes("VmRSS")
    result = call()
    peak = kilobytes("VmHWM")
    del result
    return (peak - before) << 10
