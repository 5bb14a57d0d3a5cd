#!/usr/bin/env python3
"""Do other features rank the same models alike?

    python benchmarks/features.py runs/digits --data digits --out runs/digits-features.json

Samples of the models of a finished run of run_cifar.py, compared with training images in three
kinds of features: of the small classifier of classes, of the same network trained to tell quarter
turns (what a data set without classes is measured in), and of EfficientNet-Lite0. Prints a table of
kernel distances (and Frechet distances, where there are samples enough), and Kendall's tau of every
two columns: 1 where they put all models in the same order, -1 in the reverse one.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from scipy.stats import kendalltau

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
from mcm.lab import evaluation, metrics
from mcm.lab.data import ImageData, load_data

KINDS = ("classes", "quarter turns", "EfficientNet-Lite0")


def extractors(data: ImageData, iterations: int) -> dict[str, torch.nn.Module]:
    """By name; what is trained is trained anew."""
    same = torch.zeros_like(data.labels)
    alike = replace(data, labels=same, held_labels=torch.zeros_like(data.held_labels), classes=1)
    found = {}
    with TemporaryDirectory() as folder:
        for name, learned in ((KINDS[0], data), (KINDS[1], alike)):
            path = Path(folder) / f"{len(found)}.safetensors"
            found[name], accuracy = metrics.train_classifier(learned, iterations, path)
            print(f"{name}: {accuracy:.1%} of the held-out images right", flush=True)
    return found | {KINDS[2]: metrics.EfficientNetLite0().to(data.images.device)}


def measured(args: argparse.Namespace, data: ImageData) -> list[dict]:
    """A row for each model and number of steps."""
    networks = extractors(data, args.iterations)
    real = metrics.some_rows(data.images, args.real)
    real_features = {name: metrics.embed(network, real)[0] for name, network in networks.items()}
    models = [("teacher", K) for K in args.teacher_steps]
    models += [(f"{args.method}-{K}", K) for K in args.steps]
    z = torch.randn(args.samples, *data.image_shape, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(args.samples) % data.classes
    rows = []
    for name, steps in models:
        started = time.perf_counter()
        model = mcm.load(args.run / f"{name}.safetensors", data.images.device)
        images = evaluation.generate(model, z, labels, data.images.device, 500, steps=steps)
        images = images.clamp(-1, 1)
        row = {"model": name, "steps": steps}
        for kind, network in networks.items():
            features = metrics.embed(network, images.to(data.images.device))[0]
            row[kind] = metrics.kernel_distance(real_features[kind], features, labels)
            if args.samples >= 2 * network.DIM:
                row[f"{kind}, Frechet"] = metrics.frechet(real_features[kind], features)
        rows.append(row)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in list(row.items())[2:])
        seconds = time.perf_counter() - started
        print(f"{name:8} {steps:3} steps  {shown}  ({seconds:.0f} s)", flush=True)
    return rows


def agreement(rows: list[dict]) -> dict[str, float]:
    """Kendall's tau of the order of all models, of the students and of the teacher's steps."""
    groups = {"all": rows, "students": [r for r in rows if r["model"] != "teacher"]}
    groups["teacher"] = [r for r in rows if r["model"] == "teacher"]
    found = {}
    for group, members in groups.items():
        for a, b in combinations(KINDS, 2) if len(members) > 1 else ():
            columns = [[row[kind] for row in members] for kind in (a, b)]
            found[f"{group}: {a} and {b}"] = round(float(kendalltau(*columns).statistic), 3)
    return found


def main(argv: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("run", type=Path, help="the folder of the run")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--real", type=int, default=10_000, help="at most so many training images")
    parser.add_argument("--method", choices=("cd", "ct"), default="cd")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 4, 2, 1], help="students")
    parser.add_argument("--teacher-steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--iterations", type=int, default=300, help="of each classifier's training")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data = load_data(args.data, args.data_dir, args.image_size)
    rows = measured(args, data)
    found = agreement(rows)
    for name, tau in found.items():
        print(f"{name}: tau {tau}")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings = {k: v for k, v in settings.items() if k not in ("run", "data_dir", "out")}
    seconds = round(time.perf_counter() - started)
    results = {"settings": settings, "threads": torch.get_num_threads(), "seconds": seconds}
    text = json.dumps(results | {"rows": rows, "kendall_tau": found}, indent=1)
    args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
