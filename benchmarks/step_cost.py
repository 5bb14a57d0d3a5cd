#!/usr/bin/env python3
"""What a consistency step costs beside a teacher's training step of the same network and batch.

    python benchmarks/step_cost.py                  the digits network, CPU
    python benchmarks/step_cost.py --size 32        a 1.2 M-parameter network on 32x32 images

By counting network passes (a backward pass costs two forward ones): teacher 3, consistency training
4, distillation 5, so 4/3 and 5/3. A step here is a whole one: batch, loss, gradient and update. The
three are timed in turn, many times over, and compared repeat by repeat: machines drift.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
from benchmarks.timing import in_turn, quartiles, training_step
from mcm.lab.checkpoint import write
from mcm.lab.options import hardware, pick_device, pick_precision
from mcm.lab.run import Training

LIMITS = {"teacher": "", "ct": "4/3", "cd": "5/3"}


def network(size: int) -> mcm.UNet:
    torch.manual_seed(0)
    if size == 8:
        return mcm.UNet(8, 1, 48, (1, 1), 1, (4,), classes=10)
    return mcm.UNet(size, 3, 32, classes=10)


def main(argv: list[str]) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--size", type=int, default=8, help="image size (default: 8)")
    parser.add_argument("--batch", type=int, default=128, help="(default: 128)")
    parser.add_argument("--repeats", type=int, default=15, help="(default: 15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all)")
    parser.add_argument("--device", help="(default: a GPU, where there is one)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    settings = Training(1, args.batch, precision=pick_precision(None, device))
    works = {kind: training_step(kind, network(args.size), settings, device) for kind in LIMITS}
    taken = in_turn(works, device, args.repeats)
    parameters = sum(p.numel() for p in network(args.size).parameters()) / 1e6
    about = f"{args.size}x{args.size}, batch {args.batch}, {hardware(device)}"
    print(f"{parameters:.2f} M parameters, {about}, torch {torch.__version__}, median [quartiles]")
    print("| step | ms | over the teacher's step | limit |\n|---|---|---|---|")
    figures = {
        "command": "python benchmarks/step_cost.py " + " ".join(Path(a).name for a in argv),
        "parameters_millions": round(parameters, 3),
        "size": args.size,
        "batch": args.batch,
        "device": hardware(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for kind, limit in LIMITS.items():
        milliseconds = 1000 * quartiles(taken[kind])[1]
        low, middle, high = quartiles([a / b for a, b in zip(taken[kind], taken["teacher"])])
        print(f"| {kind} | {milliseconds:.1f} | {middle:.2f} [{low:.2f}, {high:.2f}] | {limit} |")
        figures[kind] = {"milliseconds": milliseconds, "ratio": middle, "quartiles": [low, high]}
    if args.json:
        write(args.json, json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
