#!/usr/bin/env python3
"""The digits table again, with classes in exactly the training set's proportions instead of equally
often.

    python benchmarks/class_proportions.py runs/digits

Of the 1,500 training digits, some classes have a few images more than others. Samples with equal
classes differ from them in that too, which adds to every row's distance, the teacher's included,
and so lowers the ratios. Here it is gone.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
from mcm.lab import metrics
from mcm.lab.data import digits

out = Path(sys.argv[1])
data = digits()
classifier, _ = metrics.train_classifier(
    data, 300, out.parent / f"features-digits-{data.fingerprint()}-300.safetensors"
)
real = metrics.embed(classifier, data.images)[0]
z = torch.randn(
    len(data.labels), *data.image_shape, generator=torch.Generator().manual_seed(1_000_000)
)


def distance(model: mcm.Denoiser, steps: int, solver=mcm.ddim) -> float:
    images = mcm.sample(model, z, steps, data.labels, solver).clamp(-1, 1)
    return metrics.frechet(real, metrics.embed(classifier, images)[0])


teacher = mcm.load(out / "teacher.safetensors")
base = distance(teacher, 64)
print(
    f"| model | steps | Fréchet | over the teacher's 64 steps |\n|---|---|---|---|\n| teacher | "
    f"64 | {base:.3f} | 1 |"
)
for K in (1, 2, 4, 8):
    for name, model, steps, solver in (
        ("teacher, DDIM", teacher, 2 * K, mcm.ddim),
        ("teacher, aDDIM", teacher, 2 * K, mcm.addim),
        ("student", mcm.load(out / f"cd-{K}.safetensors"), K, mcm.ddim),
    ):
        d = distance(model, steps, solver)
        print(f"| {name} | {steps} | {d:.3f} | {d / base:.2f} |", flush=True)
