"""Chart of a benchmark JSON: how many times faster ours is than the best rival, per case.

python benchmarks/plot.py benchmarks/results/NAME.json [OUT.png]
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FASTER, SLOWER, ASKED = "#2a6f97", "#c0504d", "#222222"


def label(row: dict[str, Any]) -> str:
    return f"{row['case']}  {row['dtype']}  {row['mode']}  {row['threads']}T"


def draw(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    families = list(dict.fromkeys(row["family"] for row in rows))
    rows = sorted(rows, key=lambda row: (families.index(row["family"]), -row["ratio"]))[::-1]
    figure, axis = plt.subplots(figsize=(11, 1.6 + 0.27 * len(rows)), layout="constrained")
    # Bars start at 1x, so that those of slower cases point the other way.
    colours = [FASTER if r["ratio"] >= 1 else SLOWER for r in rows]
    axis.barh(range(len(rows)), [r["ratio"] - 1 for r in rows], left=1, color=colours, height=0.7)
    for y, row in enumerate(rows):
        axis.text(
            max(row["ratio"], 1) * 1.03, y, f"{row['ratio']:.2f}  vs {row['best_rival']}", va="center", fontsize=7.5
        )
    axis.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=7.5)
    axis.set_xscale("log", base=2)
    top = max(r["ratio"] for r in rows)
    axis.set_xlim(min(0.5, 0.8 * min(r["ratio"] for r in rows)), top * 6)
    powers = range(-1, math.ceil(math.log2(top)) + 1)
    axis.set_xticks([2.0**p for p in powers], [f"{2.0**p:g}x" for p in powers])
    axis.axvline(1, color=ASKED, linewidth=1)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("best rival's time / ours (log scale; above 1 = ours is faster)")
    axis.set_title(
        f"maskops {machine['maskops']}, torch {machine['torch']}, {machine['cpu']}, {machine['isa']}", fontsize=9
    )
    figure.savefig(path, dpi=130)


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(sys.argv[1])
    found = json.loads(source.read_text())
    # One bar per job: cold starts of compilers and the out-of-cache variants have their own numbers in the table.
    rows = [
        row for row in found["rows"] if "ratio" in row and row.get("cache") in ("hot", "cold") and "page_faults" in row
    ]
    hot = {label(row) for row in rows if row["cache"] == "hot"}
    rows = [row for row in rows if row["cache"] == "hot" or label(row) not in hot]
    if not rows:
        print(f"{source} holds no measured row", file=sys.stderr)
        return 1
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else source.with_suffix(".png")
    draw(rows, found["machine"], target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
