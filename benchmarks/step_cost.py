#!/usr/bin/env python3
"""What a consistency step costs beside a teacher's training step of the same network and batch.

    python benchmarks/step_cost.py                  the digits network, CPU
    python benchmarks/step_cost.py --size 32        a 1.2 M-parameter network on 32x32 images

By counting network passes (a backward pass costs two forward ones): teacher 3, consistency training
4, distillation 5, so 4/3 and 5/3. A step here is the loss, its gradient and the optimiser. The
three are timed in turn, many times over, and compared repeat by repeat: machines drift.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
from mcm import multistep

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--size", type=int, default=8, choices=[8, 32], help="image size (default: 8)")
parser.add_argument("--batch", type=int, default=128, help="(default: 128)")
parser.add_argument("--repeats", type=int, default=15, help="(default: 15)")
parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all)")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--json", type=Path, help="also write the figures here")
args = parser.parse_args()

torch.set_num_threads(args.threads)
if args.device != "cpu":
    torch.cuda.set_device(args.device if ":" in args.device else 0)
torch.manual_seed(0)
shape = (
    dict(in_channels=1, channels=48, multipliers=(1, 1), blocks=1, attention=(4,))
    if args.size == 8
    else dict(in_channels=3, channels=32)
)
network = mcm.UNet(image_size=args.size, classes=10, **shape)
student = mcm.Denoiser(network, mcm.CosineSchedule()).to(args.device)
teacher = (
    mcm.Denoiser(mcm.UNet(**network.arguments), mcm.CosineSchedule())
    .to(args.device)
    .requires_grad_(False)
    .eval()
)
optimizer = torch.optim.Adam(student.parameters(), 1e-5, fused=True)
x = torch.rand(args.batch, shape["in_channels"], args.size, args.size, device=args.device) * 2 - 1
labels = torch.randint(10, (args.batch,), device=args.device)
method = multistep(8)
STEPS = {
    "teacher": lambda: mcm.diffusion_loss(student, x, labels),
    "ct": lambda: mcm.consistency_loss(student, x, labels, method),
    "cd": lambda: mcm.consistency_loss(student, x, labels, method, teacher=teacher),
}


def timed(loss) -> float:
    if args.device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.autocast(
        args.device.split(":")[0], torch.bfloat16, enabled=args.device != "cpu", cache_enabled=False
    ):
        output = loss()
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


for loss in STEPS.values():
    timed(loss), timed(loss)
seconds = {name: [] for name in STEPS}
for _ in range(args.repeats):
    for name, loss in STEPS.items():
        seconds[name].append(timed(loss))

device = torch.cuda.get_device_name() if args.device != "cpu" else f"cpu, {args.threads} threads"
parameters = sum(p.numel() for p in network.parameters()) / 1e6
print(
    f"{parameters:.2f} M parameters, {args.size}x{args.size}, batch {args.batch}, {device}, torch "
    f"{torch.__version__}, median of {args.repeats} [quartiles]"
)
print("| step | ms | over the teacher's step | limit |\n|---|---|---|---|")
figures = {
    "command": "python benchmarks/step_cost.py " + " ".join(Path(a).name for a in sys.argv[1:]),
    "parameters_millions": round(parameters, 3),
    "size": args.size,
    "batch": args.batch,
    "device": device,
    "torch": torch.__version__,
    "python": platform.python_version(),
}
for name, limit in (("teacher", ""), ("ct", "4/3"), ("cd", "5/3")):
    ratios = sorted(a / b for a, b in zip(seconds[name], seconds["teacher"]))
    low, middle, high = (
        ratios[len(ratios) // 4],
        statistics.median(ratios),
        ratios[3 * len(ratios) // 4],
    )
    print(
        f"| {name} | {1000 * statistics.median(seconds[name]):.1f} | {middle:.2f} [{low:.2f}, "
        f"{high:.2f}] | {limit} |"
    )
    figures[name] = {
        "milliseconds": 1000 * statistics.median(seconds[name]),
        "ratio": middle,
        "quartiles": [low, high],
    }
if args.json:
    args.json.write_text(json.dumps(figures, indent=1) + "\n")
