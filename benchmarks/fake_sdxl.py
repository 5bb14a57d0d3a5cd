#!/usr/bin/env python3
"""An SDXL checkpoint of full size with random weights, 7 GB in bfloat16, to try things out on.

    python benchmarks/fake_sdxl.py runs/fake-sdxl --pixels 256
    python run_latent.py --pretrained runs/fake-sdxl --prompts FILE --iterations 2 --samples 1

Its parts are those of SDXL base 1.0, number for number, but for the tokenizers: their vocabulary is
learned from a few captions. What it draws is noise; what it costs in memory and time is real.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from sdxl_cost import SIZES
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mcm.latent.shapes import scenes
from mcm.latent.tiny_sdxl import make_tokenizer, sdxl_scheduler

TEXT = {
    "text_encoder": (CLIPTextModel, 768, 12, 12, "quick_gelu", 768),
    "text_encoder_2": (CLIPTextModelWithProjection, 1280, 32, 20, "gelu", 1280),
}


def text_encoder(name: str, tokenizer) -> torch.nn.Module:
    kind, width, layers, heads, activation, projection = TEXT[name]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--pixels", type=int, default=1024, help="the side of its images")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    captions = [scene.caption() for scene in scenes()[:2000]]
    tokenizers = {
        name: make_tokenizer(captions, args.out / name, 2000)
        for name in ("tokenizer", "tokenizer_2")
    }
    for tokenizer in tokenizers.values():
        tokenizer.model_max_length = 77
    encoders = {name: text_encoder(name, tokenizers["tokenizer"]) for name in TEXT}
    unet = UNet2DConditionModel(
        **SIZES["base"] | {"sample_size": args.pixels // 8},
        use_linear_projection=True,
        addition_embed_type="text_time",
    )
    widths = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=args.pixels,
        scaling_factor=0.13025,
    )
    parts = {"unet": unet, "vae": vae, "scheduler": sdxl_scheduler()} | tokenizers | encoders
    pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipe.save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in unet.parameters()):,} parameters in the UNet")


if __name__ == "__main__":
    main()
