#!/usr/bin/env python3
"""Quality against the training budget: one picture and one table of runs of run_latent.py that
differ in --evaluations.

    python run_latent.py --recipe all --samples 1000 --evaluations 60 --out runs/60
    python run_latent.py --recipe all --samples 1000 --evaluations 180 --out runs/180
    python benchmarks/budgets.py runs/60 runs/180 --out runs/budgets

A recipe may be spread over several runs. Writes budgets.json (the rows) and budgets.png into --out.
In place of a run, a budgets.json of before can be given, to add to it.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mcm.lab.plots import COLOURS

FIGURES = {"frechet": "Fréchet distance", "alignment": "right pictures"}


def collected(folders: list[Path]) -> dict:
    """-> the students' rows, with their budgets, and the best row of the undistilled weights."""
    students, rivals, commands = [], {}, []
    for folder in folders:
        if folder.is_file():
            before = json.loads(folder.read_text(encoding="utf-8"))
            students += before["students"]
            commands += before["commands"]
            rivals |= {(row["sampler"], row["steps"]): row for row in before["undistilled"]}
            continue
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        budget = results["settings"]["evaluations"]
        if results["settings"]["iterations"]:
            raise SystemExit(f"{folder}: a run with --iterations has no budget in evaluations")
        commands.append(results["command"])
        for row in results["rows"]:
            kept = {k: row.get(k) for k in ("sampler", "steps", "nfe", "coverage", *FIGURES)}
            if None in kept.values():
                raise SystemExit(f"{folder}: not measured against pictures")
            if row["model"] == "student":
                recipe = re.sub(r"-\d+$", "", row["recipe"])
                students.append({"recipe": recipe, "evaluations": budget, **kept})
            elif row["model"] == "undistilled":
                rivals[row["sampler"], row["steps"]] = kept
    return {"commands": commands, "students": students, "undistilled": list(rivals.values())}


def draw(found: dict, path: Path) -> None:
    """A column for each number of steps, a curve for each recipe; undistilled weights dashed."""
    counts = sorted({row["steps"] for row in found["students"]})
    recipes = list(dict.fromkeys(row["recipe"] for row in found["students"]))
    figure = Figure(figsize=(3 * len(counts), 5.6), dpi=110)
    panels = figure.subplots(len(FIGURES), len(counts), squeeze=False, sharex=True)
    for line, (key, title) in zip(panels, FIGURES.items()):
        for axes, K in zip(line, counts):
            for recipe, colour, marker in zip(recipes, COLOURS * 2, "sDo^vPX"):
                rows = [r for r in found["students"] if (r["recipe"], r["steps"]) == (recipe, K)]
                points = sorted((r["evaluations"], r[key]) for r in rows)
                if points:
                    axes.plot(*zip(*points), marker=marker, color=colour, label=recipe)
            rivals = [row[key] for row in found["undistilled"] if row["steps"] == K]
            if rivals:
                best = min(rivals) if key == "frechet" else max(rivals)
                axes.axhline(best, color="grey", linestyle="--", label="best undistilled")
            axes.set_xscale("log")
            ticks = sorted({row["evaluations"] for row in found["students"]})
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
            axes.xaxis.set_minor_locator(NullLocator())
            if key == "frechet":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:.2g}")
                axes.yaxis.set_minor_formatter("{x:.2g}")
                axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 7)))
            axes.grid(alpha=0.3, which="both")
            axes.set_title(f"{title}, {K} step{'s' * (K > 1)}", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("thousands of network evaluations in training", fontsize=8)
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path)


def table(found: dict) -> str:
    """In markdown: a line for each recipe and budget."""
    counts = sorted({row["steps"] for row in found["students"]})
    lines = ["| recipe | evaluations | " + " | ".join(f"{K}" for K in counts) + " |"]
    lines.append("|---" * (2 + len(counts)) + "|")
    places = dict.fromkeys((r["recipe"], r["evaluations"]) for r in found["students"])
    for recipe, budget in sorted(places):
        cells = []
        for K in counts:
            own = [r for r in found["students"] if r["recipe"] == recipe and r["steps"] == K]
            own = [r for r in own if r["evaluations"] == budget]
            cells.append(f"{own[0]['frechet']:.2f}, {own[0]['alignment']:.2f}" if own else "")
        lines.append(f"| {recipe} | {budget:g},000 | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    found = collected(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (args.out / "budgets.json").write_text(text + "\n", encoding="utf-8")
    draw(found, args.out / "budgets.png")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
