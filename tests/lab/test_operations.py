"""What a training step in bfloat16 asks of the device, counted: on a GPU each operation is a
launch, and a small network's step is as long as its launches.
"""

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mcm
from mcm.lab.data import ImageData
from mcm.lab.run import DenoiserRun, Training

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import run_cifar  # noqa: E402

SMALL = run_cifar.PRESETS["cifar10", "small"][1]
MOST = {"teacher": 420, "cd": 780, "ct": 600}
COPIES = ("clone", "_to_copy", "copy_", "contiguous")


class Seen(NamedTuple):
    """What there is to know of a tensor. (To keep the tensor itself would change what autograd
    does with it.)
    """

    data: int
    ndim: int
    dtype: torch.dtype
    channels_last: bool


def seen_of(tensors):
    parts = tensors if isinstance(tensors, (tuple, list)) else [tensors]
    parts = [a for a in parts if isinstance(a, torch.Tensor)]
    return [Seen(a.data_ptr(), a.ndim, a.dtype, a.ndim == 4 and a.stride(1) == 1) for a in parts]


class Watch(TorchDispatchMode):
    """Every operation but views and allocations: its name, what it was given and returned."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        view = any(a is not None and not a.is_write for a in aliases)
        if not view and not func.overloadpacket.__name__.startswith("empty"):
            self.seen.append((func.overloadpacket.__name__, seen_of(args), seen_of(out)))
        return out


def filled(network):
    """Zero-initialised layers would stop every gradient."""
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim == 1 else torch.nn.init.xavier_normal_(p)
    return network


def step(kind, tmp_path, precision="bf16"):
    """One training step of `small` on CIFAR-10's sizes. -> what was asked, and the run."""
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(8) % 10
    data = ImageData("noise", images, labels, images, labels, 10)
    network = filled(run_cifar.unet(SMALL, 3, 10))
    teacher = mcm.Denoiser(copy.deepcopy(network), mcm.CosineSchedule()).eval()
    K = None if kind == "teacher" else 4
    student = mcm.Denoiser(network, mcm.CosineSchedule(), student_steps=K)
    settings = Training(1, 4, precision=precision)
    run = DenoiserRun("m", student, settings, tmp_path)
    teacher = run.frozen(teacher.requires_grad_(False))
    method = mcm.multistep(4)
    watch = Watch()
    for _ in run:
        for x, cond, t, noise in run.parts(data):
            asked = {"t": t, "noise": noise}
            with watch:
                if kind == "teacher":
                    loss = mcm.diffusion_loss(run.model, x, cond, **asked)
                else:
                    asked["teacher"] = teacher if kind == "cd" else None
                    loss = mcm.consistency_loss(run.model, x, cond, method, **asked)
                run.backward(loss)
        run.update()
    weights = {p.data_ptr() for model in (run.model, teacher) for p in model.parameters()}
    return watch.seen, weights


def test_autocast_would_take_more(tmp_path):
    """The count can fail: casting every weight at every call, as autocast does, is over it."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        seen, _ = step("teacher", tmp_path, precision="fp32")
    assert len(seen) > 520


@pytest.mark.parametrize("kind", MOST)
def test_a_step_takes_few_operations(kind, tmp_path):
    seen, weights = step(kind, tmp_path)
    assert 200 < len(seen) <= MOST[kind]
    casts = [args[0] for name, args, _ in seen if name == "_to_copy"]
    assert casts and not [a for a in casts if a.data in weights]


def test_inside_the_network_images_stay_narrow_and_channels_last():
    """Between the first convolution and the last, forward and back: no float32 of image size; all
    convolutions but attention's are given channels_last; on the way forward nothing is copied
    outside of attention.
    """
    network = filled(run_cifar.unet(SMALL, 3, 10)).bfloat16()
    attending = []
    for module in network.modules():
        if isinstance(module, mcm.unet.Attention):
            module.register_forward_pre_hook(lambda *_: attending.append(True))
            module.register_forward_hook(lambda *_: attending.pop() and None)

    class Inside(Watch):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            copied = func.overloadpacket.__name__ in COPIES and out.ndim == 4
            assert not copied or attending or self.back, func
            return out

    z = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with Inside() as watch:
        watch.back = False
        out = network(z, torch.rand(2), torch.arange(2))
        watch.back = True
        out.backward(torch.randn_like(out))
    names = [name for name, _, _ in watch.seen]
    first = names.index("convolution")
    last = len(names) - 1 - names[::-1].index("convolution_backward")
    assert names.count("convolution") == names.count("convolution_backward") > 20
    otherwise = 0
    for name, args, outputs in watch.seen[first:last]:
        assert not [o for o in outputs if o.ndim == 4 and o.dtype != torch.bfloat16], name
        if name.startswith("convolution"):
            images = args[:2] if name == "convolution_backward" else args[:1]
            otherwise += not all(a.channels_last for a in images)
    attentions = sum(isinstance(module, mcm.unet.Attention) for module in network.modules())
    assert otherwise == attentions > 0
