"""What a benchmark run writes: the machine with its roofs, the table, the JSON."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import maskops

Row = dict[str, Any]


def machine_of(device: str, threads: list[int]) -> Row:
    """Versions, CPU and the roofs, measured now. roof_* are those of the largest thread count, "roofs" has all."""
    roofs = {t: cuda_roofs(device) if device != "cpu" else cpu_roofs(t) for t in threads}
    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "isa": isa_in_use(),
        "platform": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__, "maskops": maskops.__version__, "device": device_name(device),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "load": os.getloadavg()[0], **roofs[max(threads)], "roofs": roofs,
    }  # fmt: skip


def cpu_roofs(threads: int) -> dict[str, float]:
    try:
        from maskops import _host
    except ImportError as reason:
        Console(stderr=True).print(f"roofs are not measured: {reason}")
        return {}
    return dict(_host.measure_roofs(threads))


def cuda_roofs(device: str) -> dict[str, float]:
    """Copy and matrix product of torch itself, the best of ten."""

    def best(call: Any, work: float) -> float:
        times = []
        for _ in range(11):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return work / min(times[1:]) / 1e6

    a, b = (torch.empty(512 << 20, dtype=torch.uint8, device=device) for _ in range(2))
    roofs = {"roof_copy_gbps": best(lambda: b.copy_(a), 2 * a.numel())}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        m = torch.randn(4096, 4096, device=device, dtype=dtype)
        roofs[f"roof_gflops_{name}"] = best(lambda m=m: m @ m, 2 * 4096**3)
    return roofs


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device != "cpu" else "cpu"


def isa_in_use() -> str:
    try:
        from maskops import _host
    except ImportError:
        return "none (no compiled library)"
    return str(_host.isa_in_use())


# ---------------------------------------------------------------- the table


def print_rows(family: str, rows: list[Row], seconds: float) -> None:
    console = Console(width=None if Console().is_terminal else 190)
    table = Table(title=f"{family} ({seconds:.0f} s)", title_justify="left")
    for name in (
        "case",
        "dtype",
        "mode",
        "T",
        "cache",
        "ours ms",
        "20-80%",
        "best rival",
        "ms",
        "ratio",
        "roof",
        "asked",
    ):
        table.add_column(name, justify="right" if name in ("T", "ours ms", "ms", "ratio", "roof") else "left")
    for row in rows:
        if "refused" in row:
            table.add_row(row["case"], row["dtype"], row["mode"], str(row["threads"]), "", f"REFUSED: {row['refused']}")
            continue
        table.add_row(*cells_of(row))
    console.print(table)
    busiest = max((row["load"] for row in rows if "load" in row), default=0.0)
    if busiest > max((row["threads"] for row in rows), default=1) + 1:
        console.print(
            f"load reached {busiest:.1f}: other programs were running, so times, and ratios of short calls, are rough"
        )
    absent = {(name, reason) for row in rows for name, reason in row.get("absent", {}).items()}
    for name, reason in sorted(absent):
        console.print(f"not measured: {name}: {reason}", markup=False)
    for row in rows:
        if "breakdown" in row:
            print_breakdown(console, row)
        for line in row.get("notes", ()):
            console.print(f"{row['case']}, {row['dtype']}: {line}", markup=False)


def cells_of(row: Row) -> list[str]:
    roof, asked = row.get("roof") or {}, row["asked"]
    share = "" if roof.get("fraction") is None else f"{roof['fraction']:.2f} {roof['kind']}"
    low, high = row["ours_q20_q80"]
    verdicts = [f"{a['rival']} >= {a['ratio']:g}: {a['measured']:.2f} {'met' if a['met'] else 'MISSED'}" for a in asked]
    return [
        row["case"], row["dtype"], row["mode"], str(row["threads"]), row["cache"], f"{row['ours_ms']:.3f}", f"{low:.3f}-{high:.3f}",
        row["best_rival"], f"{row['rivals_ms'][row['best_rival']]:.3f}", f"{row['ratio']:.2f}", share, "; ".join(verdicts),
    ]  # fmt: skip


def print_breakdown(console: Console, row: Row) -> None:
    parts = row["breakdown"]
    table = Table(title=f"where the time goes: {row['case']}, {row['dtype']}, ms per step", title_justify="left")
    table.add_column("part")
    for name in parts:
        table.add_column(name, justify="right")
    for part in next(iter(parts.values())):
        totals = {name: sum(times.values()) for name, times in parts.items()}
        table.add_row(part, *(f"{times[part]:.1f} ({times[part] / totals[name]:.0%})" for name, times in parts.items()))
    console.print(table)


def write_json(path: Path, machine: Row, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
