#!/usr/bin/env python3
"""Images per second of this UNet and of three others of equal size: a training step, and a forward pass.

    pip install -r requirements-benchmarks.txt
    python benchmarks/unet_speed.py                                  1.7 M parameters, one CPU thread, under 3 minutes
    python benchmarks/unet_speed.py --parameters 35e6 --batch 256    for a GPU: bf16 and channels_last for all of them

All have three levels of 1, 2 and 2 times their first width and attention at 16x16 (denoising-diffusion-pytorch: linear attention elsewhere,
which it cannot do without), no classes, no dropout, on 32x32 RGB; widths, and 2 or 3 residual blocks a level, are those that come nearest in parameters. A training step is forward, squared error,
backward, clipping and fused AdamW. They are timed in turn, many times over, and compared repeat by repeat: machines drift.
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
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
from mcm.cli import describe, write

Call = Callable[[nn.Module, Tensor, Tensor], Tensor]


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def ours(channels: int, blocks: int) -> nn.Module:
    return mcm.UNet(32, 3, channels, (1, 2, 2), blocks, attention=(16,))


def diffusers(channels: int, blocks: int) -> nn.Module:
    from diffusers import UNet2DModel

    down, up = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    return UNet2DModel(32, 3, 3, block_out_channels=(channels, 2 * channels, 2 * channels), down_block_types=down, up_block_types=up, layers_per_block=blocks, norm_num_groups=8, attention_head_dim=32)


def ddpm(channels: int, blocks: int) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    if blocks != 2:
        raise ValueError("it has two blocks a level")
    return Unet(channels, dim_mults=(1, 2, 2), full_attn=(False, True, False), flash_attn=True)


def smalldiffusion(channels: int, blocks: int) -> nn.Module:
    from smalldiffusion import Unet

    return Unet(32, 3, 3, ch=channels, ch_mult=(1, 2, 2), num_res_blocks=blocks, attn_resolutions=(16,), dropout=0.0)


def nearest(make: Callable[[int, int], nn.Module], target: float) -> nn.Module | None:
    """The network whose size is nearest; None if the package is not there. Widths that a network cannot have are passed over."""
    best = None
    for channels, blocks in itertools.product(range(8, 321, 8), (2, 3)):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                size = parameters(make(channels, blocks))
        except ImportError:
            return None
        except (ValueError, AssertionError, RuntimeError):
            continue
        if best is None or abs(size - target) < abs(best[1] - target):
            best = (channels, blocks), size
    return make(*best[0])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.7e6, help="of each network, about (default: 1.7e6)")
    parser.add_argument("--batch", type=int, default=32, help="(default: 32)")
    parser.add_argument("--repeats", type=int, default=7, help="(default: 7)")
    parser.add_argument("--steps", type=int, default=1, help="steps per repeat; more on a GPU (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    made = {name: nearest(make, args.parameters) for name, make in (("mcm", ours), ("diffusers", diffusers), ("denoising-diffusion-pytorch", ddpm), ("smalldiffusion", smalldiffusion))}
    missing = [name for name, network in made.items() if network is None]
    if missing:
        print(f"not installed, left out: {', '.join(missing)} (pip install -r requirements-benchmarks.txt)", file=sys.stderr)
    networks = {name: network.to(device, memory_format=torch.channels_last) for name, network in made.items() if network is not None}
    calls: dict[str, Call] = {name: lambda network, z, t: network(z, t) for name in networks}
    calls["diffusers"] = lambda network, z, t: network(z, t).sample
    optimizers = {name: torch.optim.AdamW(network.parameters(), 1e-5, fused=True) for name, network in networks.items()}
    z, v = (torch.randn(args.batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last) for _ in range(2))
    t = torch.rand(args.batch, device=device)

    def train(name: str) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = (calls[name](networks[name], z, t).float() - v).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(networks[name].parameters(), 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad()

    @torch.no_grad()
    def forward(name: str) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            calls[name](networks[name], z, t)

    def rate(work: Callable[[str], None], name: str) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(args.steps):
            work(name)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return args.steps * args.batch / (time.perf_counter() - began)

    rows = {name: {"parameters": parameters(network)} for name, network in networks.items()}
    for kind, work in (("training", train), ("forward", forward)):
        for name in networks:
            rate(work, name)  # warm-up
        rates = [{name: rate(work, name) for name in networks} for _ in range(args.repeats)]
        for name in networks:
            ratios = sorted(r["mcm"] / r[name] for r in rates)
            rows[name][kind] = {"images_per_second": statistics.median(r[name] for r in rates), "ours_over_it": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}
    result = {"hardware": describe(device), "torch": torch.__version__, "python": platform.python_version(), "batch": args.batch, "repeats": args.repeats, "rows": rows}
    print(f"{result['hardware']}, batch {args.batch}, medians of {args.repeats} interleaved repeats\n")
    print("| UNet | parameters | training, images/s | ours over it | forward, images/s | ours over it |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row[k]['images_per_second']:.0f} | {row[k]['ours_over_it']:.2f} ({row[k]['range'][0]:.2f} to {row[k]['range'][1]:.2f})" for k in ("training", "forward")]
        print(f"| {name} | {row['parameters']:,} | {' | '.join(cells)} |")
    if args.out:
        write(args.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
