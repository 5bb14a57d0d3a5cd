#!/usr/bin/env python3
"""How much of a GPU's memory each recipe needs on SDXL, counted without a GPU.

    python benchmarks/sdxl_memory.py --out results/latent/memory.json

Every phase takes one training step on tensors that have shapes and no contents (PyTorch's fake
tensors), at SDXL's real sizes, in bfloat16 with a LoRA of rank 64. What
is alive at once is added up: weights, optimiser, activations, gradients. Not counted: what the
allocator rounds up and leaves unused, workspaces of cuDNN and cuBLAS, CUDA itself, a CLIP for the
reward; leave 2 GiB for them.
"""

import argparse
import gc
import json
import sys
import time
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as functional
from sdxl_cost import pipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
from mcm import losses
from mcm.lab.checkpoint import write
from mcm.lab.run import Learner, Training
from mcm.latent import distil as distillation
from mcm.latent import sdxl as adapter
from mcm.latent.objectives import Balance
from mcm.latent.recipes import RECIPES, Phase, Recipe
from mcm.latent.sdxl import Condition, unconditional

DEVICE = torch.device("cpu")
SCHEDULE = mcm.DiscreteSchedule.scaled_linear()


class Counting(TorchDispatchMode):
    """Adds up the bytes of all storages on the device that are alive, and keeps the most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tree_map_only(Tensor, self.note, result)
        return result

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != DEVICE.type or storage in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.now -= size


def moved(self: nn.Module, *where, **how) -> nn.Module:
    """In place of Module.to, which fake tensors refuse."""
    device, dtype, _, layout = torch._C._nn._parse_to(*where, **how)
    for module in self.modules():
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                if value is not None:
                    kind = dtype if value.is_floating_point() else None
                    new = value.detach().to(device or value.device, kind or value.dtype)
                    if isinstance(value, nn.Parameter):
                        new = nn.Parameter(new, value.requires_grad)
                    table[key] = new
    return self


class Places(list):
    """Stands for a tensor of indices, whose contents a fake tensor does not have."""

    def __getitem__(self, index):
        got = super().__getitem__(index)
        return Places(got) if isinstance(index, slice) else got

    def tolist(self) -> list[int]:
        return list(self)


def in_float32(norm):
    """As CUDA's autocast, but not the CPU's, runs norms."""

    def wide(x: Tensor, shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
        if torch.is_autocast_enabled(DEVICE.type):
            x, weight, bias = (None if a is None else a.float() for a in (x, weight, bias))
        return norm(x, shape, weight, bias, eps)

    return wide


@contextmanager
def fake_world():
    """Within this block everything is counted and nothing computed. -> what counts."""
    patches = [
        patch.object(nn.Module, "to", moved),
        patch.object(adapter, "noise_schedule", lambda scheduler: (SCHEDULE, "v")),
        patch.object(losses, "restored_randomness", lambda device: nullcontext()),
        patch.object(Tensor, "any", lambda self: True),  # no time is 0
        patch.object(functional, "group_norm", in_float32(functional.group_norm)),
        patch.object(functional, "layer_norm", in_float32(functional.layer_norm)),
        patch.object(torch, "randperm", lambda n: Places(range(n))),
        patch.object(torch, "randint", lambda n, size: Places([0] * size[0])),
    ]
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Counting())


def one_step(sdxl: adapter.SDXL, phase: Phase, batch: int, settings: Training) -> None:
    """A training step of a phase, as `mcm.latent.distil.train_phase` takes it."""
    job = distillation.Distillation(
        sdxl, ["a", "b"], None, None, settings, Path(), "", 8.0, reward=bright
    )
    student, teacher = sdxl.denoiser("student"), mcm.guided(sdxl.denoiser(), 8.0, unconditional)
    averages = distillation.begin_averages(sdxl, phase, settings)
    target = None if phase.target_ema is None else sdxl.denoiser("target")
    learner = Learner(sdxl.weights("student"), 1.0, averages)
    objectives = {kind: distillation.make_objective(kind, job) for kind, _ in phase.objectives}
    balance = Balance(objectives, DEVICE)
    cond = Condition(
        torch.randn(batch, 77, 2048, device=DEVICE),
        torch.randn(batch, 1280, device=DEVICE),
        torch.randn(batch, 6, device=DEVICE),
    )
    # where z_t comes from needs no gradient, and less memory than what follows
    x = torch.randn(batch, 4, sdxl.size, sdxl.size, device=DEVICE)
    asked = {"teacher": teacher, "target": target, "progress": 1.0}
    bf16 = torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False)
    with bf16:
        output = mcm.consistency_loss(student, x, cond, phase.method, **asked)
        prompts = ["a"] * batch
        total, _ = distillation.total_gradient(output, objectives, phase, prompts, balance)
    output.x_hat.backward(total)
    learner.update()
    output = output._replace(x_hat=output.x_hat.detach())
    for objective in objectives.values():
        for _ in range(objective.updates):
            with bf16:
                loss = objective.critic_loss(output)
            loss.backward()
            objective.learner.update()
    for name in ("fake", "critic"):
        if name in sdxl.unets:
            sdxl.remove(name)


def bright(images: Tensor, prompts: list[str]) -> Tensor:
    """Something like a reward."""
    return images.mean((1, 2, 3))


def count(recipe: Recipe, batch: int, checkpointing: bool, rank: int, size: str) -> list[float]:
    """-> GiB at the peak of a step of each phase."""
    peaks = []
    with fake_world() as counting:
        sdxl = adapter.SDXL(
            pipeline(size, DEVICE, torch.bfloat16), rank, checkpointing=checkpointing
        )
        for name in ("student", "average"):
            sdxl.add_lora(name)
        if any(phase.target_ema is not None for phase in recipe.phases):
            sdxl.add_lora("target")
        settings = Training(1, batch, precision="bf16")
        known = {}
        for phase in recipe.phases:
            method = phase.method
            alike = (phase.objectives, phase.target_ema, method.sub_steps, method.teacher_eta)
            if alike not in known:
                gc.collect()
                counting.most = counting.now
                one_step(sdxl, phase, batch, settings)
                known[alike] = round(counting.most / 2**30, 2)
            peaks.append(known[alike])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    args = parser.parse_args()
    rows = []
    for recipe in args.recipes:
        for batch in args.batches:
            began = time.perf_counter()
            made = RECIPES[recipe](4)
            peaks = count(made, batch, not args.no_checkpointing, args.rank, args.size)
            rows.append({"recipe": recipe, "batch": batch, "gib": peaks})
            print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    about = {"size": args.size, "rank": args.rank, "checkpointing": not args.no_checkpointing}
    about["torch"] = torch.__version__
    write(args.out, json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
