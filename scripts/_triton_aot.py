"""Compile every launch that the Triton launchers make, for several GPUs, on a machine without one.

The launchers run on meta tensors of the shapes in AOT_SAMPLES of kernels/F and record what they would launch. Each
recorded launch is specialised as Triton's JIT would do it: 16-byte aligned pointers, integers divisible by 16 or equal
to 1. So what is compiled here is what a GPU would run, not a second list of configurations.
"""

import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from maskops.kernels._common import Arg, record_launches
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maskops.families import FAMILIES

# Target -> shared memory that one block may have, in bytes.
TARGETS = {"cuda:80": 166912, "cuda:90": 232448, "cuda:100": 232448, "hip:gfx942": 65536}
MATRIX_UNITS = {
    "cuda:80": r"\bmma\.sync", "cuda:90": r"\bwgmma\.mma_async|\bmma\.sync", "cuda:100": r"\btcgen05\.mma|\bmma\.sync",
    "hip:gfx942": r"\bv_mfma",
}  # fmt: skip
TYPE_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


def target_of(name):
    backend, arch = name.split(":")
    return GPUTarget(backend, int(arch) if arch.isdigit() else arch, 32 if backend == "cuda" else 64)


def record_all(quick, families):
    """{key: (op, launch)} over every op, sample and dtype of the families.

    quick: bfloat16 only (float32 where the op has no 16-bit type), and three launches of every kernel.
    """
    launches = {}
    for family in families:
        module = importlib.import_module(f"maskops.kernels.{family}")
        for op, samples in module.AOT_SAMPLES.items():
            dtypes = module.LIMITS[op]["dtypes"] or (torch.float32,)
            if quick:
                dtypes = (torch.bfloat16,) if torch.bfloat16 in dtypes else dtypes[:1]
            for dtype in dtypes:
                for sample in samples:
                    for launch in _record(getattr(module, op), sample, dtype):
                        launches.setdefault(launch_key(launch), (op, launch))
    return _three_of_each_kernel(launches) if quick else launches


def _three_of_each_kernel(launches):
    by_kernel = {}
    for key, (_, launch) in launches.items():
        by_kernel.setdefault((launch.kernel.fn.__module__, launch.kernel.__name__), []).append(key)
    chosen = {key for keys in by_kernel.values() for key in (keys[0], keys[len(keys) // 2], keys[-1])}
    return {key: value for key, value in launches.items() if key in chosen}


def _record(launcher, sample, dtype):
    dtypes = {"float": dtype, "accumulator": torch.float64 if dtype == torch.float64 else torch.float32}

    def tensor(a):
        return torch.empty(a.shape, dtype=dtypes.get(a.dtype) or getattr(torch, a.dtype), device="meta")

    args = [tensor(a) if isinstance(a, Arg) else a for a in sample]
    found = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            torch.set_float32_matmul_precision(precision)
            with record_launches() as recorded:
                launcher(*args)
            found += recorded
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def specialise(launch):
    """(signature, constexprs, attributes, options) of a recorded launch."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | {k: v for k, v in launch.meta.items() if k in names}
    options = {k: v for k, v in launch.meta.items() if k not in names} | {"enable_fp_fusion": True}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif launch.kernel.params[i].is_constexpr or value is None or value == 1:
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def launch_key(launch):
    signature, constants, attributes, options = specialise(launch)
    return f"{launch.kernel.__name__} {signature} {constants} {sorted(attributes)} {options}"


def kernels_without_launch(launches, families):
    """Names of the JIT kernels of the families that no sample reaches."""
    reached = {(launch.kernel.fn.__module__, launch.kernel.__name__) for _, launch in launches.values()}
    root = Path(importlib.import_module("maskops.kernels").__path__[0])
    # What families share must be reached by one of them.
    wanted = {*families, "_common.py"} if set(families) == set(FAMILIES) else set(families)
    defined = {
        (".".join(("maskops.kernels", *path.relative_to(root).with_suffix("").parts)), name)
        for path in root.rglob("*.py")
        if path.relative_to(root).parts[0] in wanted
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    return sorted(f"{module}.{name}" for module, name in defined - reached)


_WORK = []  # (op, launch), set before the workers are forked: launches cannot be pickled


def compile_all(quick, jobs, families):
    """One row (dict) per launch and target."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("ahead-of-time compilation needs a process without TRITON_INTERPRET=1")
    launches = record_all(quick, families)
    _WORK[:] = list(launches.values())
    missing = kernels_without_launch(launches, families)
    tasks = [(i, target) for i in range(len(_WORK)) for target in TARGETS]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        rows = list(
            track(pool.imap(_compile_one, tasks, chunksize=8), "Triton", len(tasks), disable=not sys.stderr.isatty())
        )
    rows += [_row("", name, "", "", error="no AOT sample reaches this kernel") for name in missing]
    return rows


def _row(op, kernel, target, config, **facts):
    row = {"op": op, "kernel": kernel, "target": target, "config": config, "error": "", "warps": 0, "registers": 0}
    return row | {"spills": 0, "local_bytes": 0, "shared": 0, "matrix": "-"} | facts


def _compile_one(task):
    index, target = task
    op, launch = _WORK[index]
    signature, constants, attributes, options = specialise(launch)
    names = launch.kernel.arg_names
    types = {v.removeprefix("*") for v in signature.values() if v.startswith("*")}
    config = f"{'/'.join(sorted(types & {'bf16', 'fp16', 'fp32', 'fp64'}))} " + " ".join(
        f"{names[i]}={v}" for (i,), v in constants.items() if names[i].isupper()
    )
    row = _row(op, launch.kernel.__name__, target, config, warps=options.get("num_warps", 4))
    try:
        source = ASTSource(launch.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target_of(target), options=options)
    except Exception as failure:  # the table shows it, and the check fails on it
        return row | {"error": f"does not compile: {str(failure).splitlines()[-1][:200]}"}
    row["shared"] = compiled.metadata.shared
    row |= _cubin_facts(compiled.asm["cubin"]) if target.startswith("cuda") else _hsaco_facts(compiled.asm["amdgcn"])
    row["matrix"] = _matrix_use(compiled.asm, target)
    return row | {"error": _verdict(row, types)}


def _cubin_facts(cubin):
    """Registers and stack of the cubin, by Triton's own cuobjdump: a spilled register lives on the stack."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "local_bytes": usage["STACK"] + usage["LOCAL"]}


def _hsaco_facts(text):
    def fact(name):
        return max(int(v) for v in re.findall(rf"\.{name}:\s*(\d+)", text))

    return {
        "registers": fact("vgpr_count"),
        "spills": fact("vgpr_spill_count"),
        "local_bytes": fact("private_segment_fixed_size"),
    }


def _matrix_use(asm, target):
    """Which matrix instruction a kernel with a tl.dot uses; "none" if none, "-" without tl.dot."""
    if "tt.dot" not in asm["ttir"]:
        return "-"
    found = re.findall(MATRIX_UNITS[target], asm["ptx" if target.startswith("cuda") else "amdgcn"])
    exact = "inputPrecision = ieee" in asm["ttir"] or "inputPrecision" not in asm["ttir"]
    return sorted(set(found))[-1] if found else ("none (ieee)" if exact else "none")


def _verdict(row, types):
    if row["local_bytes"] or row["spills"]:
        return f"spills: {row['local_bytes']} bytes of local memory"
    if row["shared"] > TARGETS[row["target"]]:
        return f"shared memory {row['shared']} is above the limit {TARGETS[row['target']]}"
    # Exact float32 and float64 products have no matrix unit on some chips; everything else must use one.
    exact_allowed = row["matrix"] == "none (ieee)" and not types & {"bf16", "fp16"}
    if row["matrix"].startswith("none") and not exact_allowed:
        return "tl.dot without matrix instructions"
    return ""
