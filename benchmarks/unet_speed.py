#!/usr/bin/env python3
"""This UNet beside three others of equal size: images per second in training and in a forward pass,
and what they learn from equal images.

    pip install -e ".[benchmarks]"
    python benchmarks/unet_speed.py
        1.7 M parameters, one CPU thread, under 3 minutes
    python benchmarks/unet_speed.py --parameters 35e6 --batch 256
        on a GPU: bf16 and channels_last for all of them (with --compile, compiled)
    python benchmarks/unet_speed.py --learn 2000 --size 16
        train each on CIFAR-10 (--data-dir) at 16x16: 40 minutes on one CPU thread

All but the last two have three levels of 1, 2 and 2 times their first width and attention in the
second (denoising-diffusion-pytorch: linear attention elsewhere, which it cannot do without), no
dropout, no classes, on RGB; widths, and 1 to 3 residual blocks a level where there is a choice, are
those that come nearest in parameters. "mcm, 1 2 3" and "mcm, 1 2 4" are this UNet with one block a
level, wider where there are few pixels: the first with attention in the lower two levels, the
second as in the small presets. A training step is forward, squared error, backward, clipping and
fused AdamW. They are timed in turn, many times over, and compared repeat by repeat: machines drift.
--learn trains each alone, from the same batches, times and noise, on the v-loss.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
from benchmarks.timing import in_turn
from mcm.lab.checkpoint import write
from mcm.lab.data import batch_indices, load_data, to_float
from mcm.lab.options import hardware, pick_device
from mcm.lab.run import Training


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def ours(
    multipliers: tuple[int, ...], attention: tuple[int, ...], only: int | None = None
) -> Callable[[int, int, int], nn.Module]:
    """This UNet with attention in the levels `attention`, counted from 0, and any number of blocks
    a level or `only` so many.
    """

    def make(size: int, channels: int, blocks: int) -> nn.Module:
        if only not in (None, blocks):
            raise ValueError(f"it has {only} a level")
        return mcm.UNet(
            size, 3, channels, multipliers, blocks, tuple(size >> level for level in attention)
        )

    return make


def diffusers(size: int, channels: int, blocks: int) -> nn.Module:
    from diffusers import UNet2DModel

    down, up = (
        ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    widths = (channels, 2 * channels, 2 * channels)
    return UNet2DModel(
        size,
        3,
        3,
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=blocks,
        norm_num_groups=8,
        attention_head_dim=min(32, 2 * channels),
    )


def ddpm(size: int, channels: int, blocks: int) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    if blocks != 2:
        raise ValueError("it has two blocks a level")
    return Unet(channels, dim_mults=(1, 2, 2), full_attn=(False, True, False), flash_attn=True)


def smalldiffusion(size: int, channels: int, blocks: int) -> nn.Module:
    from smalldiffusion import Unet

    return Unet(
        size,
        3,
        3,
        ch=channels,
        ch_mult=(1, 2, 2),
        num_res_blocks=blocks,
        attn_resolutions=(size // 2,),
        dropout=0.0,
    )


# how each is made, and how it is called with images z (B, 3, H, W) and times t (B,) in (0, 1): in
# the time that it expects
NETWORKS: dict[
    str, tuple[Callable[[int, int, int], nn.Module], Callable[[nn.Module, Tensor, Tensor], Tensor]]
] = {
    "mcm": (ours((1, 2, 2), (1,)), lambda network, z, t: network(z, t)),
    "diffusers": (diffusers, lambda network, z, t: network(z, 1000 * t).sample),
    "denoising-diffusion-pytorch": (ddpm, lambda network, z, t: network(z, 1000 * t)),
    "smalldiffusion": (
        smalldiffusion,
        lambda network, z, t: network(z, torch.tan(t.clamp(0.001, 0.999) * torch.pi / 2)),
    ),
    "mcm, 1 2 3": (ours((1, 2, 3), (1, 2), only=1), lambda network, z, t: network(z, t)),
    "mcm, 1 2 4": (ours((1, 2, 4), (1,), only=1), lambda network, z, t: network(z, t)),
}


def nearest(
    make: Callable[[int, int, int], nn.Module], size: int, target: float
) -> nn.Module | None:
    """The network whose size is nearest; None if the package is not there. Widths that a network
    cannot have are passed over.
    """
    best = None
    for channels, blocks in itertools.product(range(8, 321, 8), (1, 2, 3)):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = parameters(make(size, channels, blocks))
        except ImportError:
            return None
        except (ValueError, AssertionError, RuntimeError):
            continue
        if best is None or abs(found - target) < abs(best[1] - target):
            best = (channels, blocks), found
    torch.manual_seed(0)
    return make(size, *best[0])


def speeds(
    networks: dict[str, nn.Module], args: argparse.Namespace, device: torch.device
) -> dict[str, dict]:
    """By name: images per second in training and forward, and ours over it, repeat by repeat:
    median, smallest, largest.
    """
    optimizers = {
        name: torch.optim.AdamW(network.parameters(), 1e-5, fused=True)
        for name, network in networks.items()
    }
    z, v = (
        torch.randn(args.batch, 3, args.size, args.size, device=device).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    t = torch.rand(args.batch, device=device)

    def train(name: str) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = (NETWORKS[name][1](networks[name], z, t).float() - v).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(networks[name].parameters(), 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad()

    @torch.no_grad()
    def forward(name: str) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            NETWORKS[name][1](networks[name], z, t)

    rows = {name: {"parameters": parameters(network)} for name, network in networks.items()}
    for kind, work in (("training", train), ("forward", forward)):
        works = {name: partial(work, name) for name in networks}
        taken = in_turn(works, device, args.repeats, args.steps)
        for name in networks:
            ratios = sorted(a / b for a, b in zip(taken["mcm"], taken[name]))
            rows[name][kind] = {
                "images_per_second": args.batch / statistics.median(taken[name]),
                "over_mcm": statistics.median(ratios),
                "range": [ratios[0], ratios[-1]],
            }
    return rows


def learned(
    network: nn.Module, call: Callable, args: argparse.Namespace, device: torch.device
) -> dict:
    """Train on CIFAR-10 for args.learn steps; -> the v-loss on its held-out images, before and
    after, and the seconds.
    """
    data = load_data("cifar10", args.data_dir, args.size).to(device)
    model = mcm.Denoiser(
        lambda z, t, cond: call(network, z.to(memory_format=torch.channels_last), t.float()),
        mcm.CosineSchedule(),
    )
    settings, optimizer = (
        Training(args.learn, args.batch, lr=1e-3),
        torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    )

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    @torch.no_grad()
    @autocast
    def validation() -> float:
        x = to_float(data.held_images[:1000])
        generator = torch.Generator(device).manual_seed(0)
        noise, t = (
            torch.randn(x.shape, generator=generator, device=device),
            (torch.arange(len(x), device=device) + 0.5) / len(x),
        )
        return statistics.mean(
            mcm.diffusion_loss(model, x[i], t=t[i], noise=noise[i]).loss.item()
            for i in torch.arange(len(x), device=device).split(100)
        )

    before, began = validation(), time.perf_counter()
    for i in range(args.learn):
        torch.manual_seed(i)
        optimizer.param_groups[0]["lr"] = settings.lr_at(i)
        with autocast:
            loss = mcm.diffusion_loss(
                model, to_float(data.images[batch_indices(len(data.images), args.batch, i, 0)])
            ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"seconds": time.perf_counter() - began, "before": before, "after": validation()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parameters", type=float, default=1.7e6, help="of each network, about (default: 1.7e6)"
    )
    parser.add_argument("--size", type=int, default=32, help="of the images (default: 32)")
    parser.add_argument("--batch", type=int, default=32, help="(default: 32)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: 5)")
    parser.add_argument(
        "--steps", type=int, default=1, help="steps per repeat; more on a GPU (default: 1)"
    )
    parser.add_argument(
        "--learn",
        type=int,
        metavar="STEPS",
        help="instead: train each for so many steps, and compare what they have learned",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="with --learn: where CIFAR-10 is (default: data)",
    )
    parser.add_argument("--compile", action="store_true", help="each network, by torch.compile")
    parser.add_argument("--device", help="(default: a GPU, where there is one)")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default: 1)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also write the figures here, as JSON"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    made = {name: nearest(make, args.size, args.parameters) for name, (make, _) in NETWORKS.items()}
    missing = [name for name, network in made.items() if network is None]
    if missing:
        print(
            f"not installed, left out: {', '.join(missing)} (pip install -e '.[benchmarks]')",
            file=sys.stderr,
        )
    networks = {
        name: network.to(device, memory_format=torch.channels_last)
        for name, network in made.items()
        if network is not None
    }
    if args.compile:
        for network in networks.values():
            network.compile()
    about = SimpleNamespace(
        compiled=args.compile,
        hardware=hardware(device),
        torch=torch.__version__,
        python=platform.python_version(),
        size=args.size,
        batch=args.batch,
    )
    if args.learn:
        about.steps = args.learn
        print(
            f"{about.hardware}, {args.size}x{args.size}, {args.learn} steps of batch {args.batch}\n"
            f"\n| UNet | parameters | v-loss on held-out images | before training | seconds |\n"
            f"|---|---|---|---|---|"
        )
        rows = {}
        for name, network in networks.items():
            rows[name] = {"parameters": parameters(network)} | learned(
                network, NETWORKS[name][1], args, device
            )
            print(
                f"| {name} | {rows[name]['parameters']:,} | {rows[name]['after']:.4f} | "
                f"{rows[name]['before']:.2f} | {rows[name]['seconds']:.0f} |",
                flush=True,
            )
    else:
        about.repeats, rows = args.repeats, speeds(networks, args, device)
        print(
            f"{about.hardware}, {args.size}x{args.size}, batch {args.batch}, medians of "
            f"{args.repeats} interleaved repeats [smallest, largest]\n"
        )
        print(
            "| UNet | parameters | training, images/s | over mcm's | forward, images/s | over "
            "mcm's |\n|---|---|---|---|---|---|"
        )
        for name, row in rows.items():
            cells = [
                f"{row[k]['images_per_second']:.0f} | {row[k]['over_mcm']:.2f} "
                f"[{row[k]['range'][0]:.2f}, {row[k]['range'][1]:.2f}]"
                for k in ("training", "forward")
            ]
            print(f"| {name} | {row['parameters']:,} | {' | '.join(cells)} |")
    if args.out:
        write(args.out, json.dumps(vars(about) | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
