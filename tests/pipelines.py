"""What the tests of the latent half share: pipelines of tiny size."""

from functools import lru_cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline

from mcm.latent import shapes
from mcm.latent.tiny_sdxl import make_tokenizer, make_unet, text_encoder

ENGLISH = [
    "a small red circle on black",
    "a large blue square above a small green triangle on white",
    "a large yellow circle on green",
    "a small blue square on anything",
]
CHINESE = [
    "黑色背景上的小红圆",
    "白色背景上的大蓝方块在小绿三角上方",
    "绿色背景上的大黄圆",
    "任意背景上的小蓝方块",
]


def untrained_pipeline(
    folder: Path, captions=ENGLISH, width: int = 32, channels=(16, 32), size: int = 32
) -> StableDiffusionXLPipeline:
    """All parts of an SDXL pipeline, initialised at random but so that every input matters."""
    torch.manual_seed(0)
    tokenizers = [
        make_tokenizer(captions, folder / name, 400) for name in ("tokenizer", "tokenizer_2")
    ]
    encoders = [text_encoder(tokenizers[0], width, False), text_encoder(tokenizers[1], width, True)]
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=size,
        scaling_factor=0.5,
    )
    unet = make_unet(size // 4, width, channels=channels)
    scheduler = DDIMScheduler(
        1000,
        0.00085,
        0.012,
        "scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    pipe = StableDiffusionXLPipeline(
        vae,
        *encoders,
        *tokenizers,
        unet,
        scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@lru_cache(maxsize=1)
def drawn(n: int = 600) -> tuple[tuple[str, ...], torch.Tensor]:
    """Captions and pictures (n, 3, 32, 32) uint8 of the world of shapes."""
    pool = shapes.choose(shapes.split_scenes()[0], n, 0)
    return tuple(s.caption() for s in pool), shapes.draw(pool, 0)
