"""Compile every CUDA C++ source for several GPUs with nvcc, on a machine without one, and read what ptxas says."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=c++20", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xptxas", "-v")
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


class Chip(NamedTuple):
    """What one multiprocessor holds (CUDA programming guide, table of compute capabilities)."""

    warps: int
    blocks: int
    shared: int  # bytes
    reserved: int  # bytes of shared memory that the system takes from every block


CHIPS = {
    "sm_75": Chip(32, 16, 64 << 10, 0),
    "sm_80": Chip(64, 32, 164 << 10, 1 << 10),
    "sm_90": Chip(64, 32, 228 << 10, 1 << 10),
    "sm_100": Chip(64, 32, 228 << 10, 1 << 10),
    "sm_120": Chip(48, 24, 100 << 10, 1 << 10),
}
REGISTERS = 65536  # per multiprocessor, on every chip above
BLOCK_SHARED = 48 << 10  # static shared memory that a block may have on every chip


def occupancy(chip, threads, registers, shared):
    """Part of the multiprocessor's warps that can be resident; dynamic shared memory is not known here."""
    warps = -(-threads // 32)
    # Registers are given out to warps in units of 256.
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = (REGISTERS // warp_registers) // warps if registers else chip.blocks
    used = shared + chip.reserved
    by_shared = chip.shared // used if used else chip.blocks
    blocks = min(chip.blocks, chip.warps // warps, by_registers, by_shared)
    return blocks * warps / chip.warps


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    return next((c for c in [*candidates, shutil.which("nvcc")] if c and os.access(c, os.X_OK)), None)


def compile_all(jobs, families):
    """One row (dict) per kernel and chip; a single row with an error where there is no nvcc."""
    nvcc = find_nvcc()
    folder = ROOT / "csrc" / "cuda"
    sources = sorted(p for p in folder.rglob("*.cu") if p.relative_to(folder).with_suffix("").parts[0] in families)
    if nvcc is None:
        return [_row("", "", "", error="no nvcc on the PATH or in CUDA_HOME: the CUDA sources were NOT compiled")]
    if not sources:
        return [_row("", "", "", error="no CUDA sources: gpu-check runs in a source tree of maskops")]
    tasks = [(nvcc, source, chip) for source in sources for chip in CHIPS]
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda task: _compile_one(*task), tasks)
        rows = [row for rows in track(done, "nvcc", len(tasks), disable=not sys.stderr.isatty()) for row in rows]
    return _demangled(rows)


def _row(source, kernel, target, **facts):
    row = {"source": source, "kernel": kernel, "target": target, "error": "", "threads": 0, "registers": 0, "shared": 0}
    return row | {"stack": 0, "spill_stores": 0, "spill_loads": 0, "occupancy": 0.0} | facts


def _compile_one(nvcc, source, chip):
    name = str(source.relative_to(ROOT / "csrc" / "cuda"))
    include = Path(torch.__file__).parent / "include"
    folders = [ROOT / "csrc", include, include / "torch/csrc/api/include"]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-cubin", f"-arch={chip}", *FLAGS, TARGET, *(f"-I{f}" for f in folders)]
        command += ["--keep", "--keep-dir", folder, "-o", f"{folder}/out.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            problem = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            return [_row(name, "", chip, error=f"does not compile: {problem[:200]}")]
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    return [_judged(row) for row in _parse(name, chip, done.stderr, _block_sizes(ptx))]


def _block_sizes(ptx):
    """Kernel -> threads of a block, from __launch_bounds__."""
    sizes = {}
    for entry in ptx.split(".entry ")[1:]:
        bounds = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry)
        if bounds:
            x, y, z = (int(v or 1) for v in bounds.groups())
            sizes[re.match(r"\s*(\S+?)\(", entry).group(1)] = x * y * z
    return sizes


def _parse(source, chip, text, block_sizes):
    """Rows of `ptxas -v`: properties of every function, then the registers of the kernel."""
    rows, row = [], None
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            row = _row(source, entry.group(1), chip)
            rows.append(row)
        # Functions that were not inlined follow their kernel: the largest stack counts.
        elif row is not None and (m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)):
            for key, value in zip(("stack", "spill_stores", "spill_loads"), m.groups(), strict=True):
                row[key] = max(row[key], int(value))
        elif row is not None and (m := re.search(r"Used (\d+) registers", line)):
            row["registers"] = int(m.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            row["shared"] = int(shared.group(1)) if shared else 0
    for row in rows:
        row["threads"] = block_sizes.get(row["kernel"], 0)
    return rows


def _judged(row):
    row["occupancy"] = occupancy(CHIPS[row["target"]], row["threads"] or 256, row["registers"], row["shared"])
    if row["spill_stores"] or row["spill_loads"]:
        row["error"] = f"spills: {row['spill_stores']} bytes stored, {row['spill_loads']} loaded"
    elif row["stack"]:
        row["error"] = f"local memory: {row['stack']} bytes of stack"
    elif not row["threads"]:
        row["error"] = "no __launch_bounds__: the register budget is not fixed"
    elif row["shared"] > BLOCK_SHARED:
        row["error"] = f"static shared memory {row['shared']} is above {BLOCK_SHARED}"
    return row


def _demangled(rows):
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    names = sorted({row["kernel"] for row in rows})
    if tool and names:
        done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
        readable = dict(zip(names, done.stdout.splitlines(), strict=True))
        for row in rows:
            row["kernel"] = _short(readable[row["kernel"]])
    return rows


def _short(name):
    """'void maskops::(anonymous namespace)::f<float, 4>(Args)' -> 'f<float, 4>'."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("maskops::", "")
    name = re.sub(r"_GLOBAL__N__\w+::", "", name)
    return re.sub(r"\(.*\)$", "", name)
