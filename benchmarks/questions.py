#!/usr/bin/env python3
"""The questions that a reader of the paper asks, one run each, from the same teacher: run_cifar.py
again and again, and one table.

    python benchmarks/questions.py --data digits
        about an hour on one CPU core
    python benchmarks/questions.py --data cifar10 --preset tiny --student-iterations 500
        2 to 3 hours on one CPU core
    python benchmarks/questions.py --data cifar10 --preset base
        for a GPU
    python benchmarks/questions.py --table runs/questions-digits-0 runs/questions-digits-1
        only the tables, over seeds and data sets

Whatever run_cifar.py takes may follow. Each variant has a folder in --out (default:
runs/questions-DATA-SEED); what is there is not repeated, so the same command goes on after an
interruption.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
import run_cifar
from mcm.lab.checkpoint import write

# Of every variant: what it changes, and for which K. The rest is as in "base": DDIM in the
# teacher's step, N annealed, squared distance for K = 1 and Huber for more, weights from the
# teacher.
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


@dataclass(frozen=True)
class Question:
    title: str
    paper: str
    """What the paper's figures are, or what it says without any."""
    figures: dict[str, dict[int, float]]
    """The paper's FIDs by K (arXiv 2403.06807)."""
    variants: dict[str, tuple[int, ...]]
    """What answers it here, and for which K: of VARIANTS, or the teacher's own samples."""


QUESTIONS = [
    Question(
        "How many steps does a student need?",
        "tables 1 and 5, FID on ImageNet 64; the teacher's is 1.5 in 512 steps.",
        {
            "CD, 394 M": {1: 4.3, 2: 2.0, 4: 1.7, 8: 1.6},
            "CD, 1.23 B": {1: 3.2, 2: 1.9, 4: 1.6, 8: 1.4},
        },
        {"base": (1, 2, 4, 8), "teacher, DDIM": (1, 2, 4, 8), "teacher, aDDIM": (2, 4, 8)},
    ),
    Question(
        "A teacher, or the images alone?",
        "table 3, FID on ImageNet 64.",
        {"CD": {1: 4.3, 8: 1.6}, "CT": {1: 7.2, 8: 1.5}},
        {"base": (1, 8), "ct": (1, 8)},
    ),
    Question(
        "DDIM or aDDIM in the teacher's step?",
        "table 4, FID on ImageNet 64.",
        {"DDIM": {1: 3.91, 8: 1.70}, "aDDIM": {1: 4.35, 8: 1.58}},
        {"base": (1, 8), "addim": (1, 8)},
    ),
    Question(
        "N annealed or constant?",
        "table 2, FID on ImageNet 128.",
        {"64 to 1280": {1: 7.0}, "128": {1: 8.8}, "256": {1: 7.6}, "1024": {1: 10.8}},
        {"base": (1,), "few-points": (1,), "many-points": (1,)},
    ),
    Question(
        "Squared distance or Huber?",
        "unsquared works better, above all in few steps; no figures.",
        {},
        {"base": (1, 8), "huber": (1,), "squared": (8,)},
    ),
    Question(
        "From the teacher's weights, or from random ones?",
        "the teacher's, in distillation and in consistency training: both become more robust and "
        "converge faster; no figures.",
        {},
        {"base": (1, 8), "random": (1, 8)},
    ),
]


def study(argv: list[str]) -> Path:
    """Make what is not there yet; -> the folder."""
    config = run_cifar.parse(argv)
    out = Path(f"runs/questions-{config.data}-{config.seed}")
    if "--out" in argv:
        out = config.out
    first, last = (min(n, config.max_points) for n in config.grid)
    for name, flags in VARIANTS.items():
        folder = out / name
        if (folder / "results.json").is_file():
            continue
        mine = [
            *argv,
            *flags.format(first=first, last=last).split(),
            "--out",
            str(folder),
            "--resume",
        ]
        if name != "base":
            mine += ["--teacher", str(out / "base" / "teacher.safetensors")]
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "rows.json").is_file():
                # the teacher has been measured, in seconds that are not this variant's
                rows = json.loads((out / "base" / "rows.json").read_text(encoding="utf-8"))
                write(folder / "rows.json", json.dumps(rows | {"seconds": 0.0}))
        print(f"\n=== {name}: {flags}", flush=True)
        if run_cifar.run(mine):
            sys.exit(f"{name} failed")
    return out


def answers(folders: list[Path]) -> str:
    """One table per question, in markdown. Of each data set: the mean Fréchet distance over its
    folders, which differ in their seeds, with the spread, and in brackets the mean ratio to the
    teacher's 64 steps.
    """
    runs: dict[str, list[dict]] = {}
    for folder in folders:
        made = {
            name: json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
            for name in VARIANTS
            if (folder / name / "results.json").is_file()
        }
        runs.setdefault(
            f"{made['base']['data']} "
            f"{made['base']['settings']['image_size']}x{made['base']['settings']['image_size']}",
            [],
        ).append(made)

    def cell(seeds: list[dict], variant: str, K: int) -> str:
        """A variant that was not run is left blank."""
        model, sampler = (
            ("teacher", variant.split()[-1].lower())
            if variant.startswith("teacher")
            else ("student", "ddim")
        )
        name, method = (
            ("base", "mcm-cd")
            if model == "teacher"
            else (variant, "mcm-ct" if variant == "ct" else "mcm-cd")
        )
        distances, ratios = [], []
        for run in seeds:
            rows = run[name]["rows"] if name in run else []
            teacher = [r["frechet"] for r in rows if r["model"] == "teacher" and r["steps"] == 64]
            found = [
                r["frechet"]
                for r in rows
                if r["model"] == model
                and r.get("recipe", method) == method
                and r["sampler"] == sampler
                and r["steps"] == K
            ]
            distances += found
            ratios += [a / b for a, b in zip(found, teacher)]
        if not distances:
            return ""
        spread = f" ± {statistics.stdev(distances):.2f}" if len(distances) > 1 else ""
        return f"{statistics.mean(distances):.2f}{spread} ({statistics.mean(ratios):.2f})"

    lines = []
    for question in QUESTIONS:
        columns = sorted({K for steps in question.variants.values() for K in steps})
        lines += [
            "",
            f"### {question.title}",
            "",
            f"The paper: {question.paper}",
            "",
            f"| | {' | '.join(f'K = {K}' for K in columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for label, values in question.figures.items():
            lines.append(
                f"| *the paper, {label}* | {' | '.join(str(values.get(K, '')) for K in columns)} |"
            )
        for data, seeds in runs.items():
            for variant, steps in question.variants.items():
                cells = [cell(seeds, variant, K) if K in steps else "" for K in columns]
                lines.append(f"| {data}, {variant} | {' | '.join(cells)} |")
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
