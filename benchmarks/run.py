"""The benchmark command: ours against every installed rival, interleaved, after checking that they agree.

    python benchmarks/run.py [--family F ...] [--case NAME] [--mode fwd,fwd+bwd,build] [--threads T]
                             [--quick] [--json OUT] [--device cuda]

ratio = best rival's time / ours. A "hot" row calls everything on the same inputs; a "cold" row rotates over input sets that exceed
the caches; in a "cold, kept pages" row malloc also keeps freed memory, so that neither side pays page faults for its results.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Compile times are reported as cold times, so nothing may come out of a cache of an earlier run.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import torch
from _harness import (
    Case,
    Forward,
    Inputs,
    Row,
    Timer,
    check_case,
    cold_sets,
    interleaved,
    keep_pages,
    prepared,
    quantiles,
    return_pages,
    runner,
)
from _report import machine_of, print_rows, write_json

from maskops.families import FAMILIES

# Beside the families: whole models, each with its own bench_<name>.py.
MODELS = ("mae_step", "minilm")
HOT, COLD, KEPT = "hot", "cold", "cold, kept pages"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", action="extend", choices=[*FAMILIES, *MODELS], help="default: all")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--mode", help="comma separated: fwd, fwd+bwd, build")
    parser.add_argument(
        "--threads", type=lambda text: [int(t) for t in text.split(",")], default=[2], help="a number, or 1,2"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the main rows only, without torch.compile, within 60 s a family"
    )
    parser.add_argument("--json", type=Path, help="write machine and rows here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, help="of measuring per row (default 4, quick 0.8)")
    return parser.parse_args()


def wanted(case: Case, args: argparse.Namespace) -> bool:
    modes = set(args.mode.split(",")) if args.mode else None
    by_name = args.case is None or args.case.lower() in case.name.lower()
    # A case with compiled rivals also has a build row.
    fits = modes is None or case.mode in modes or ("build" in modes and bool(case.compiled))
    return by_name and fits and (case.quick or not args.quick)


def contenders_of(case: Case, quick: bool) -> tuple[dict[str, Forward], dict[str, str]]:
    """The rivals, compiled ones included, and those that are absent with the reason."""
    rivals, absent = dict(case.rivals), dict(case.absent)
    for name in case.rivals:
        if name not in case.compiled:
            continue
        if quick:
            absent[f"{name}, compiled"] = "left out by --quick: compiling takes longer than the run"
        else:
            torch._dynamo.reset()
            rivals[f"{name}, compiled"] = torch.compile(case.rivals[name], dynamic=False)
    return rivals, absent


def build_times(case: Case, rivals: dict[str, Forward], inputs: Inputs) -> dict[str, float]:
    """Milliseconds of the first call of what compiles, and of ours: the cold start. Empty where nothing compiles."""
    compiled = {name: forward for name, forward in rivals.items() if name.endswith(", compiled")}
    times = {}
    for name, forward in {"ours": case.ours, **compiled}.items() if compiled else ():
        start = time.perf_counter()
        runner(case, forward)(inputs)
        times[name] = (time.perf_counter() - start) * 1e3
    return times


def measure_case(case: Case, family: str, threads: int, args: argparse.Namespace, machine: Row) -> list[Row]:
    torch.set_num_threads(threads)
    device = torch.device(args.device)
    base = {
        "family": family, "case": case.name, "mode": case.mode, "dtype": str(case.dtype).removeprefix("torch."),
        "threads": threads, "backend": "native", "device": device.type,
    }  # fmt: skip
    inputs = prepared(case, case.make(device, 0))
    rivals, absent = contenders_of(case, args.quick)
    rows = []
    try:
        build = build_times(case, rivals, inputs)
        check_case(case, inputs, rivals)
    except AssertionError as reason:
        return [{**base, "refused": str(reason)}]
    if build:
        rows.append(row_of({**base, "mode": "build", "cache": "cold start"}, {n: [t] for n, t in build.items()}, {}))
    modes = args.mode.split(",") if args.mode else None
    if modes is not None and case.mode not in modes:
        return rows
    calls = {"ours": runner(case, case.ours), **{name: runner(case, forward) for name, forward in rivals.items()}}
    for cache in variants(case, device, inputs):
        times, faults, rounds = measure_variant(case, cache, calls, inputs, args)
        row = row_of({**base, "cache": cache}, times, case.asked if cache == HOT else {})
        row |= {"rounds": rounds, "page_faults": faults, "absent": absent, "load": os.getloadavg()[0]}
        if case.work is not None:
            row["roof"] = roof_of(case, case.work(inputs), row["ours_ms"], machine, threads)
        rows.append(row)
    if case.after is not None and not args.quick and (device.type == "cpu" or not case.apart):
        rows[-1] |= after_apart(case, family, threads) if case.apart else case.after(inputs)
    return rows


def after_apart(case: Case, family: str, threads: int) -> Row:
    """What case.after gives in a process of its own, on the CPU."""
    call = f"import run; run.print_after({family!r}, {(case.name, case.mode, str(case.dtype))!r}, {threads})"
    command = [sys.executable, "-c", call]
    out = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def print_after(family: str, row: tuple[str, str, str], threads: int) -> None:
    torch.set_num_threads(threads)
    cases = importlib.import_module(f"bench_{family}").cases()
    case = next(case for case in cases if case.apart and (case.name, case.mode, str(case.dtype)) == row)
    print(json.dumps(case.after(prepared(case, case.make(torch.device("cpu"), 0)))))


def variants(case: Case, device: torch.device, inputs: Inputs) -> tuple[str, ...]:
    if device.type != "cpu":
        return (COLD,)
    return (HOT, COLD, KEPT) if cold_sets(case, device, inputs) > 1 else (HOT,)


def measure_variant(
    case: Case, cache: str, calls: dict, inputs: Inputs, args: argparse.Namespace
) -> tuple[dict, int, int]:
    device = torch.device(args.device)
    seconds = args.seconds or (0.8 if args.quick else 4.0)
    count = 1 if cache == HOT else cold_sets(case, device, inputs)
    sets = [inputs, *(prepared(case, case.make(device, seed)) for seed in range(1, count))]
    if cache == KEPT and not keep_pages():
        raise RuntimeError("the 'kept pages' rows need glibc's mallopt")
    try:
        times, faults = interleaved(calls, sets, Timer(device), seconds, 3 if args.quick else 5, case.rounds)
    finally:
        if cache == KEPT:
            return_pages()
    return times, faults, len(times["ours"])


def row_of(base: Row, times: dict[str, list[float]], asked: dict[str, float]) -> Row:
    spread = {name: quantiles(t) for name, t in times.items()}
    ours, rivals = spread.pop("ours"), {name: q[1] for name, q in spread.items()}
    best = min(rivals, key=rivals.__getitem__)
    row = base | {
        "ours_ms": ours[1], "ours_q20_q80": [ours[0], ours[2]], "rivals_ms": rivals,
        "rivals_q20_q80": {name: [q[0], q[2]] for name, q in spread.items()}, "best_rival": best, "ratio": rivals[best] / ours[1],
    }  # fmt: skip
    row["asked"] = [verdict for rival, least in asked.items() if (verdict := judge(rival, least, rivals, ours[1]))]
    return row


def judge(rival: str, least: float, rivals: dict[str, float], ours: float) -> Row | None:
    """What the project asks of this row: {"rival", "ratio", "measured", "met"}; None where that rival is not here."""
    groups = {
        "best": list(rivals),
        "eager": [n for n in rivals if not n.endswith(", compiled")],
        "compiled": [n for n in rivals if n.endswith(", compiled")],
    }
    chosen = [name for name in groups.get(rival, [rival]) if name in rivals]
    if not chosen:
        return None
    measured = min(rivals[name] for name in chosen) / ours
    return {"rival": rival, "ratio": least, "measured": measured, "met": measured >= least}


def roof_of(case: Case, work: int, ms: float, machine: Row, threads: int) -> Row:
    """Share of the roof measured in this run: useful bytes or flops per second over what the machine can do."""
    roofs = machine["roofs"].get(threads, {})
    key = (
        "roof_copy_gbps"
        if case.kind == "bytes"
        else f"roof_gflops_{'bf16' if case.dtype == torch.bfloat16 else 'fp32'}"
    )
    rate = work / ms / 1e6
    return {"kind": case.kind, "fraction": rate / roofs[key] if key in roofs else None, "work": work, "rate": rate}


def main() -> int:
    args = parse()
    machine = machine_of(args.device, args.threads)
    rows: list[Row] = []
    for family in args.family or [*FAMILIES, *MODELS]:
        module = importlib.import_module(f"bench_{family}")
        began, found = time.perf_counter(), [case for case in module.cases() if wanted(case, args)]
        measured = []
        for threads in args.threads:
            for case in found:
                print(
                    f"{family}: {case.name}, {case.mode}, {case.dtype}, {threads} threads", file=sys.stderr, flush=True
                )
                measured += measure_case(case, family, threads, args, machine)
                if args.json:
                    write_json(args.json, machine, rows + measured)
        print_rows(family, measured, time.perf_counter() - began)
        rows += measured
    return 1 if any("refused" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
