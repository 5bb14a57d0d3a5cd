#!/usr/bin/env python3
"""What each preset of run_cifar.py asks of a GPU, counted here without one: a table.

    python benchmarks/presets.py

Parameters; operations of a forward pass, 2 per multiplication with addition; memory that does not
depend on the batch (weights, their bfloat16 copies, averages, gradients, Adam's two moments, and
for a student the teacher's bfloat16 copy); memory per image (what a forward pass in bfloat16 keeps
for backward); the batch that fits into 24 GB. Hours to the paper's budget, 200,000 steps of 2,048
images: by operations, at the rate that the one run on an H100 reached with `small`
(results/cifar10/small-h100/log.jsonl). Larger networks reach more of a card than that.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
import run_cifar

LOG = Path(__file__).resolve().parent.parent / "results/cifar10/small-h100/log.jsonl"
PRESETS = {("cifar10", "small"): 10, ("cifar10", "base"): 10, ("imagenet64", "base"): 1000}
BUDGET = 200_000 * 2048  # images
GIB = 2**30


def counted(data: str, preset: str, classes: int) -> dict:
    """-> parameters, operations of a forward pass, bytes kept for backward; of one image."""
    config = run_cifar.PRESETS[data, preset][1]
    network = run_cifar.unet(config, 3, classes).bfloat16()
    z = torch.randn(1, 3, config.image_size, config.image_size, dtype=torch.bfloat16)
    known = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    label = torch.zeros(1, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(z, torch.rand(1), label)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # attention's counted too
        run_cifar.unet(config, 3, classes)(torch.empty(z.shape), torch.empty(1), label.to("meta"))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "flops": counter.get_total_flops(),
        "bytes": sum(kept.values()),
    }


def rate() -> float:
    """Operations per second of the teacher's training on the H100, the median over its log."""
    lines = (json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines())
    speeds = sorted(e["images_per_second"] for e in lines if e["model"] == "teacher")
    return 3 * counted("cifar10", "small", 10)["flops"] * speeds[len(speeds) // 2]


def main() -> int:
    reached = rate()
    print(f"hours at {reached / 1e12:.0f} TFLOP/s, which small reached on an H100; mcm", end=" ")
    print(f"{mcm.__version__}, torch {torch.__version__}\n")
    titles = "preset | parameters | GFLOP, forward | GiB, fixed: teacher, student | MiB per image"
    titles += " | batch in 24 GB | hours, teacher: one H100 | eight | hours, a CD student: one H100"
    print(f"| {titles} |\n{'|---' * len(titles.split('|'))}|")
    for (data, preset), classes in PRESETS.items():
        found = counted(data, preset, classes)
        fixed = [found["parameters"] * n / GIB for n in (4 + 2 + 4 + 4 + 8, 4 + 2 + 4 + 4 + 8 + 2)]
        batch = int((22 - fixed[1]) * GIB / found["bytes"])
        hours = 3 * found["flops"] * BUDGET / reached / 3600
        cells = [f"{data} {preset}", f"{found['parameters'] / 1e6:.1f} M"]
        cells += [f"{found['flops'] / 1e9:.2f}", f"{fixed[0]:.2f}, {fixed[1]:.2f}"]
        cells += [f"{found['bytes'] / 2**20:.1f}", str(batch)]
        cells += [f"{hours:.0f}", f"{hours / 8:.0f}", f"{hours * 5 / 3:.0f}"]
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
