#!/usr/bin/env python3
"""Several runs that differ in their seed, as one table of means and spreads.

    python benchmarks/over_seeds.py runs/seed-0 runs/seed-1 runs/seed-2

The folders hold the results.json of run_latent.py. The spread is the standard deviation over runs.
Ratio: the Fréchet distance over that of the better undistilled row, of the same run, with the same
sampler and as many network evaluations.
"""

import json
import statistics
import sys
from pathlib import Path

FIGURES = {"frechet": 3, "ratio": 2, "coverage": 3, "recall": 3, "alignment": 3}


def with_ratios(rows: list[dict]) -> dict[tuple, dict]:
    """Rows by (name, sampler, steps, NFE); students with their ratio."""
    plain = [row for row in rows if row["model"].startswith("undistilled")]
    for row in rows:
        base = [
            r["frechet"] for r in plain if (r["nfe"], r["sampler"]) == (row["nfe"], row["sampler"])
        ]
        row["ratio"] = row["frechet"] / min(base) if base and row["model"] == "student" else None
    return {
        (row.get("recipe") or row["model"], row["sampler"], row["steps"], row["nfe"]): row
        for row in rows
    }


def main(folders: list[str]) -> int:
    if not folders:
        print(__doc__)
        return 2
    runs = [
        with_ratios(json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))["rows"])
        for folder in folders
    ]
    print(
        f"| model | sampler | steps | NFE | {' | '.join(FIGURES)} |\n|{'---|' * (4 + len(FIGURES))}"
    )
    for key in runs[0]:
        if not all(key in run for run in runs):
            continue
        cells = []
        for figure, digits in FIGURES.items():
            values = [run[key][figure] for run in runs]
            if None in values:
                cells.append("")
            else:
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        print(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
