#!/usr/bin/env python3
"""The questions that a reader of the paper asks, one run each, from the same teacher: run_cifar.py again and again, and one table.

    python benchmarks/questions.py --data digits                                             20 minutes on one CPU core
    python benchmarks/questions.py --data cifar10 --preset tiny --student-iterations 500     90 minutes on one CPU core
    python benchmarks/questions.py --data cifar10 --preset base                              for a GPU
    python benchmarks/questions.py --table runs/questions-digits-0 runs/questions-digits-1   one table of several seeds

Whatever run_cifar.py takes may follow. Each variant has a folder in --out (default: runs/questions-DATA-SEED); what is there is not
repeated, so the same command goes on after an interruption.
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
import run_cifar

# Of every variant: what it changes, and for which K. The rest is as in "base": DDIM in the teacher's step, N annealed, squared distance
# for K = 1 and Huber for more, weights from the teacher.
VARIANTS = {
    "base": "--steps 1 2 4 8 --x-var none",
    "ct": "--steps 1 8 --x-var none --method ct",
    "addim": "--steps 1 8 --x-var mse",
    "huber": "--steps 1 --x-var none --distance huber",
    "squared": "--steps 8 --x-var none --distance squared",
    "few-points": "--steps 1 --x-var none --grid {first} {first}",
    "many-points": "--steps 1 --x-var none --grid {last} {last}",
    "random": "--steps 1 8 --x-var none --init random",
}
QUESTIONS = {
    "Does distillation need many steps?": ("arXiv 2403.06807, table 1, FID on ImageNet 64, small: 4.3, 2.0, 1.7, 1.6 in 1, 2, 4, 8 steps; the teacher 1.5 in 512", {"base": (1, 2, 4, 8)}),
    "A teacher, or data alone?": ("table 3: CD 4.3, CT 7.2 in 1 step; 1.6 and 1.5 in 8", {"base": (1, 8), "ct": (1, 8)}),
    "DDIM or aDDIM in the teacher's step?": ("table 4: DDIM 3.91, aDDIM 4.35 in 1 step; 1.70 and 1.58 in 8", {"base": (1, 8), "addim": (1, 8)}),
    "N annealed or constant?": ("table 2, ImageNet 128, 1 step: annealed from 64 to 1280 7.0; constant 128, 256, 1024: 8.8, 7.6, 10.8", {"base": (1,), "few-points": (1,), "many-points": (1,)}),
    "Squared or Huber?": ("an unsquared distance is better than a squared one, above all in few steps (no figures)", {"base": (1, 8), "huber": (1,), "squared": (8,)}),
    "From the teacher's weights, or from random ones?": ("the teacher's make both methods more robust and faster to converge (no figures)", {"base": (1, 8), "random": (1, 8)}),
}


def study(argv: list[str]) -> Path:
    """Make what is not there yet; -> the folder."""
    args = run_cifar.parse(argv)
    out = args.out_given or Path(f"runs/questions-{args.data}-{args.seed}")
    first, last = min(args.grid[0], args.max_points), min(args.grid[1], args.max_points)
    for name, flags in VARIANTS.items():
        folder = out / name
        if (folder / "results.json").is_file():
            continue
        mine = [*argv, *flags.format(first=first, last=last).split(), "--out", str(folder), "--resume"]
        if name != "base":
            mine += ["--teacher", str(out / "base" / "teacher.safetensors")]
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "rows.json").is_file():  # the teacher has been measured
                shutil.copy(out / "base" / "rows.json", folder)
        print(f"\n=== {name}: {flags}", flush=True)
        if run_cifar.run(mine):
            sys.exit(f"{name} failed")
    return out


def answers(folders: list[Path]) -> str:
    """One table per question, in markdown: means over the folders, which differ in their seeds, with the spread."""
    runs = [{name: json.loads((folder / name / "results.json").read_text()) for name in VARIANTS if (folder / name / "results.json").is_file()} for folder in folders]

    def figures(name: str, model: str, steps: int) -> tuple[list[float], list[float]]:
        """Of each seed: the Fréchet distance, and over the teacher's in 64 steps."""
        distances, ratios = [], []
        for run in runs:
            rows = run[name]["rows"]
            teacher = next(r["frechet"] for r in rows if r["model"] == "teacher" and r["steps"] == 64)
            found = next(r["frechet"] for r in rows if r["model"] == model and r["steps"] == steps and r["sampler"] == "ddim")
            distances.append(found), ratios.append(found / teacher)
        return distances, ratios

    def shown(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    lines = []
    for question, (claim, variants) in QUESTIONS.items():
        lines += ["", f"**{question}** The paper: {claim}.", "", "| variant | K | Fréchet | over the teacher's 64 steps |", "|---|---|---|---|"]
        for name, steps in variants.items():
            lines += [f"| {name} | {K} | {shown(d)} | {shown(r)} |" for K in steps for d, r in [figures(name, "student", K)]]
    return "\n".join(lines[1:]) + "\n"


def main(argv: list[str]) -> int:
    if argv[:1] == ["--table"]:
        print(answers([Path(a) for a in argv[1:]]))
        return 0
    try:
        print("\n" + answers([study(argv)]))
    except mcm.InputError as error:
        print(f"questions.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
