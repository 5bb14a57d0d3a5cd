"""The network: a small UNet for 8x8 to 64x64 images, by hand.

    image -> conv -> [blocks, halve] ... blocks -> middle -> blocks [double, blocks] ... -> conv
                       `------------ skip connections, concatenated ------------'

Every block is conditioned on the time and the class by a scale and a shift of its second
normalisation (as in ADM, arXiv 2105.05233). Its last layer starts at zero, so that a block begins
as its skip connection, and the untrained network answers 0.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import InputError

GROUPS = 8  # groups of every GroupNorm; channels must be a multiple of it


def zero(layer: nn.Module) -> nn.Module:
    """The layer with its weights and bias set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class TimeEmbedding(nn.Module):
    """t in [0, 1], (B,) -> (B, width): sines and cosines of 1000 t at geometric frequencies, then
    two layers.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        exponents = -math.log(10_000) * torch.arange(channels // 2) / (channels // 2)
        frequencies = 1000 * torch.exp(exponents)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.frequencies.float()
        waves = torch.cat([angle.sin(), angle.cos()], dim=1)
        return self.layers(waves.to(self.layers[0].weight.dtype))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a modulation by time and class: (B, c_in, H, W) -> (B, c_out, H,
    W).
    """

    def __init__(self, c_in: int, c_out: int, width: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * c_out)
        self.norm2 = nn.GroupNorm(GROUPS, c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = rearrange(self.modulation(emb), "b (two c) -> two b c 1 1", two=2)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over all pixels, in heads of about `head_channels` channels; keeps the shape
    (B, C, H, W).
    """

    def __init__(self, channels: int, head_channels: int = 32):
        super().__init__()
        most = max(1, channels // head_channels)
        self.heads = next(n for n in range(most, 0, -1) if channels % n == 0)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        heads = "b (three n c) h w -> three b n (h w) c"
        qkv = rearrange(self.qkv(self.norm(x)), heads, three=3, n=self.heads)
        y = F.scaled_dot_product_attention(*qkv)
        return x + self.out(rearrange(y, "b n (h w) c -> b (n c) h w", h=x.shape[2]))


class Level(nn.Module):
    """One residual block, with attention after it where the resolution asks for it."""

    def __init__(self, c_in: int, c_out: int, width: int, dropout: float, attention: bool):
        super().__init__()
        self.block = ResidualBlock(c_in, c_out, width, dropout)
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.block(x, emb))


class UNet(nn.Module):
    """network(z, t, cond): z (B, C, H, W), t (B,) in [0, 1], cond (B,) labels or None -> (B, C, H,
    W).

    image_size: height and width; must be divisible by 2 ** (levels - 1).
    channels: width of the first level.
    multipliers: width of each level over `channels`.
    blocks: residual blocks per level, on the way down and up.
    attention: the resolutions (in pixels) that have attention.
    classes: number of classes, 0 for unconditional. The label `classes` itself means "no class", as
        does cond=None (what label dropout trains and guidance uses).
    Raises InputError for sizes that do not fit.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        channels: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (16,),
        classes: int = 0,
        dropout: float = 0.0,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.arguments = arguments  # for checkpoints: all that is needed to make this network again
        stride = 2 ** (len(multipliers) - 1)
        if image_size % stride:
            raise InputError(f"image size {image_size} is not divisible by {stride}: fewer levels")
        if channels < 1 or channels % GROUPS:
            raise InputError(f"channels must be a positive multiple of {GROUPS}, not {channels}")
        if min(multipliers) < 1 or blocks < 1 or not 0 <= dropout < 1:
            raise InputError("multipliers and blocks must be positive, dropout in [0, 1)")
        self.classes = classes
        self.blocks = blocks
        width = 4 * channels
        self.time = TimeEmbedding(channels, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)

        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        skips = []
        c = channels
        widths = [channels * m for m in multipliers]
        sizes = [image_size // 2**i for i in range(len(widths))]
        for size, w in zip(sizes, widths):
            for _ in range(blocks):
                self.down.append(Level(c, w, width, dropout, size in attention))
                skips.append(c := w)
        self.middle = Level(c, c, width, dropout, sizes[-1] in attention)
        for size, w in zip(reversed(sizes), reversed(widths)):
            for _ in range(blocks):
                self.up.append(Level(c + skips.pop(), w, width, dropout, size in attention))
                c = w
        self.last = nn.Sequential(
            nn.GroupNorm(GROUPS, c), nn.SiLU(), zero(nn.Conv2d(c, in_channels, 3, padding=1))
        )
        # the layout that convolutions are fastest in, on CPU and GPU
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        emb = self.time(t)
        if self.label is not None:
            if cond is None:
                cond = torch.full_like(t, self.classes, dtype=torch.long)
            emb = emb + self.label(cond)
        emb = F.silu(emb)
        h = self.first(z)
        skips = []
        for i, level in enumerate(self.down):
            if i and i % self.blocks == 0:
                h = F.avg_pool2d(h, 2)
            skips.append(h := level(h, emb))
        h = self.middle(h, emb)
        for i, level in enumerate(self.up):
            if i and i % self.blocks == 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = level(torch.cat([h, skips.pop()], dim=1), emb)
        return self.last(h)
