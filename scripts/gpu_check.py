"""Prove what can be proved about the GPU kernels on a machine without a GPU, and print it as three tables.

1. Triton: every launch configuration compiles for cuda:80, 90, 100 and hip:gfx942, fits into shared memory, spills
   nothing, and uses matrix instructions where it has a tl.dot.
2. CUDA C++: every kernel compiles with nvcc for sm_75, 80, 90, 100 and 120, and spills nothing.
3. Bytes: the global memory traffic that the emulator counts, against the least that the op can do with.

Ends with exit status 1 if any row has an error, and says which. Nothing here measures time.
"""

import argparse
import json
import math
import os
import sys
from itertools import groupby
from pathlib import Path

from maskops.families import FAMILIES


def main():
    options = _options()
    failed = 0
    report = {}
    if not options.cuda_only:
        import _triton_aot

        rows = report["triton"] = _triton_aot.compile_all(options.quick, options.jobs, options.family)
        failed += _show("Triton, compiled ahead of time", _triton_table(rows), rows, ("kernel", "target", "config"))
    if not options.triton_only:
        import _cuda_aot

        rows = report["cuda"] = _cuda_aot.compile_all(options.jobs, options.family)
        failed += _show("CUDA C++, compiled by nvcc", _cuda_table(rows), rows, ("source", "kernel", "target"))
    if not (options.triton_only or options.cuda_only):
        import _traffic

        rows = report["bytes"] = _traffic.measure(options.family)
        failed += _show("Global memory of one call (CUDA C++ under the emulator)", _bytes_table(rows), rows, ("op",))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    print(f"gpu-check: {failed} errors" if failed else "gpu-check: all good. GPU timings are not measured here.")
    return 1 if failed else 0


def _options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--triton-only", action="store_true")
    only.add_argument("--cuda-only", action="store_true")
    parser.add_argument("--quick", action="store_true", help="Triton: one dtype and three launches of every kernel")
    parser.add_argument(
        "--family", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="F", help="these families alone"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every row to this file")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    return parser.parse_args()


def _show(title, table, rows, names):
    """Print a table and the rows that have an error; the number of errors."""
    print(f"\n== {title}")
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    errors = [row for row in rows if row["error"]]
    for row in errors:
        print(f"ERROR {' '.join(str(row[name]) for name in names if row[name])}: {row['error']}")
    return len(errors)


def _grouped(rows, *names):
    def key(row):
        return tuple(row[name].split("<")[0] for name in names)

    return [(k, list(group)) for k, group in groupby(sorted(rows, key=key), key)]


def _most(rows, name):
    return str(max(row[name] for row in rows))


def _errors(rows):
    return str(sum(bool(row["error"]) for row in rows))


def _triton_table(rows):
    names = ("warps", "registers", "shared", "local_bytes")
    lines = [("kernel", "target", "launches", *names, "matrix units", "errors")]
    for (kernel, target), group in _grouped(rows, "kernel", "target"):
        matrix = ", ".join(sorted({row["matrix"] for row in group}))
        facts = [_most(group, name) for name in names]
        lines.append((kernel, target, str(len(group)), *facts, matrix, _errors(group)))
    return lines


def _cuda_table(rows):
    names = ("threads", "registers", "shared", "stack", "spill_stores")
    lines = [("kernel", "target", "instances", *names, "occupancy", "errors")]
    for (_, kernel, target), group in _grouped(rows, "source", "kernel", "target"):
        facts = [_most(group, name) for name in names]
        least = f"{min(row['occupancy'] for row in group):.0%}"
        lines.append((kernel, target, str(len(group)), *facts, least, _errors(group)))
    return lines


def _bytes_table(rows):
    lines = [("op", "least", "counted", "counted/least", "note")]
    for row in rows:
        ratio = row["counted"] / row["least"] if row["least"] else math.nan
        numbers = [(row["least"], ".0f"), (row["counted"], ".0f"), (ratio, ".2f")]
        lines.append((row["op"], *("-" if math.isnan(v) else f"{v:{spec}}" for v, spec in numbers), row["note"]))
    return lines


if __name__ == "__main__":
    sys.exit(main())
