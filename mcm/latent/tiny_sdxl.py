"""A real SDXL pipeline, of tiny size, trained from scratch on captioned images: no download.

Everything is of the kinds that SDXL is made of: an AutoencoderKL, two CLIP text encoders with two
tokenizers, a UNet with text_time embeddings, the scaled-linear schedule of 1000 steps with its
non-zero terminal SNR, epsilon-prediction. What is saved loads in stock diffusers. Only the sizes
differ, and that nobody trained the text encoders before: they learn with the UNet.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..denoiser import Denoiser
from ..errors import InputError
from ..lab.checkpoint import must_be
from ..lab.data import batch_indices, fingerprint, to_float
from ..lab.run import Learner, Run, Training
from ..losses import diffusion_loss
from ..solvers import mean_over_dims
from .sdxl import Condition, Network, noise_schedule

# the end must not be id 2: transformers then pools at the largest id instead
SPECIAL = ["!", "<|pad|>", "<|startoftext|>", "<|endoftext|>"]
WIDTH = 64  # of each text encoder


def make_tokenizer(captions: Sequence[str], folder: Path, vocabulary: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair vocabulary is learned from these captions.

    Every other text still tokenises. A run that is continued keeps its tokens.
    """
    vocab_file = folder / "vocab.json"
    merges_file = folder / "merges.txt"
    if not merges_file.is_file():
        vocab, merges = learn_tokens(captions, vocabulary)
        folder.mkdir(parents=True, exist_ok=True)
        vocab_file.write_text(json.dumps(vocab), encoding="utf-8")
        lines = ["#version: 0.2", *merges, ""]
        merges_file.write_text("\n".join(lines), encoding="utf-8")
    vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
    lines = merges_file.read_text(encoding="utf-8").split("\n")[1:-1]
    pairs = [tuple(line.split(" ")) for line in lines]
    tokenizer = CLIPTokenizer(vocab, pairs, pad_token="<|endoftext|>")
    longest = max(len(tokenizer(c).input_ids) for c in captions)
    tokenizer.model_max_length = min(77, 8 * math.ceil(longest / 8))
    return tokenizer


def learn_tokens(captions: Sequence[str], vocabulary: int) -> tuple[dict[str, int], list[str]]:
    """-> token to id, and the merges, "a b" each."""
    model = CLIPTokenizer({token: i for i, token in enumerate(SPECIAL)}, [])._tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model.train_from_iterator(captions, trainer)
    learned = json.loads(model.to_str())["model"]
    # Renumbered, as the trainer's order is not the same in every run; with single letters that end
    # a word, seen or not.
    ends = {letter + "</w>" for letter in alphabet}
    tokens = SPECIAL + sorted((set(learned["vocab"]) | ends) - set(SPECIAL))
    merges = [" ".join(m) if isinstance(m, list) else m for m in learned["merges"]]
    return {token: i for i, token in enumerate(tokens)}, merges


def text_encoder(tokenizer: CLIPTokenizer, width: int, projection: bool) -> nn.Module:
    """One of SDXL's two text encoders; the second has a projection."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # CLIP's 0.02 would starve the cross-attention, which reads an unnormalised layer
            nn.init.normal_(module.weight, std=0.5)
    return model


def make_unet(size: int, width: int, channels: Sequence[int]) -> UNet2DConditionModel:
    """size: of latents. width: of one text encoder, of two. channels: of the two resolutions."""
    return UNet2DConditionModel(
        sample_size=size,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=1,
        cross_attention_dim=2 * width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + width,
    )


def make_autoencoder(size: int) -> AutoencoderKL:
    autoencoder = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=size,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        # log-variances start low: noise as loud as the latents would hold up the first thousand
        # steps
        autoencoder.quant_conv.bias[4:] -= 6
    return autoencoder


def sdxl_scheduler() -> DDIMScheduler:
    """SDXL's noise schedule, sampled from its very end."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def train_tiny_sdxl(
    captions: Sequence[str],
    images: Tensor,
    out: Path,
    vae: Training,
    unet: Training,
    *,
    channels: Sequence[int] = (64, 128),
    device: str | torch.device = "cpu",
) -> StableDiffusionXLPipeline:
    """Train a pipeline on images (n, 3, S, S) uint8 and their captions; save it in `out`, return
    it.

    vae, unet: how long to train the two parts. channels: of the UNet's two resolutions. A pipeline
    that is there already is loaded instead; a run cut short is continued. Raises InputError unless
    S is a multiple of 8, if `out` holds something else, or if the run was on other images.
    """
    if (out / "model_index.json").is_file():
        return StableDiffusionXLPipeline.from_pretrained(out)
    size = images.shape[-1]
    if size % 8:
        raise InputError(f"images of {size} pixels: the side must be a multiple of 8")
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is there, and is no pipeline: choose a new folder for one")
    work = out.resolve().with_name(out.resolve().name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    must_be(work, images=fingerprint(images, captions))
    torch.manual_seed(vae.seed)
    autoencoder = make_autoencoder(size)
    words = {word for caption in captions for word in caption.split()}
    vocabulary = 324 if len(set(captions)) > 4 * len(words) else 2000
    folders = (work / "tokenizer", work / "tokenizer_2")
    tokenizers = [make_tokenizer(captions, folder, vocabulary) for folder in folders]
    encoders = [text_encoder(t, WIDTH, projection=bool(n)) for n, t in enumerate(tokenizers)]
    network = make_unet(size // 4, WIDTH, channels)
    parts = (autoencoder, *encoders, *tokenizers, network, sdxl_scheduler())
    pipe = StableDiffusionXLPipeline(
        *parts, force_zeros_for_empty_prompt=True, add_watermarker=False
    )
    for module in (autoencoder, network):  # a quarter faster on a CPU
        module.to(memory_format=torch.channels_last)
    pipe.to(device)
    train_autoencoder(autoencoder, images, vae, work)
    latents = encode(autoencoder, to_float(images))
    train_unet(pipe, captions, latents, size, unet, work)
    pipe.save_pretrained(work)
    for state in (*work.glob("*.safetensors"), work / "run.json"):
        state.unlink()
    if out.exists():
        out.rmdir()
    os.replace(work, out)
    return StableDiffusionXLPipeline.from_pretrained(out)


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, x: Tensor) -> Tensor:
    parts = (part.to(autoencoder.device) for part in x.split(64))
    return torch.cat([autoencoder.encode(part).latent_dist.mode().cpu() for part in parts])


def train_autoencoder(
    autoencoder: AutoencoderKL, images: Tensor, settings: Training, out: Path
) -> None:
    """Squared errors; absolute and squared errors of the finite differences (the edges); some KL.

    The decoder sees latents with noise of 0.15 of their spread, so that it forgives what a UNet
    gets wrong. At the end the latents are whitened, so that scaling_factor = 1 is right.
    """
    learner = Learner(dict(autoencoder.named_parameters()), settings.clip)
    run = Run("vae", {"vae": learner}, settings, out, resume=True)
    for step in run:
        rows = batch_indices(len(images), settings.batch, step, settings.seed)
        x = to_float(images[rows]).to(autoencoder.device)
        posterior = autoencoder.encode(x).latent_dist
        z = posterior.sample()
        spread = z.detach().std((0, 2, 3), keepdim=True)
        error = autoencoder.decode(z + 0.15 * spread * torch.randn_like(z)).sample - x
        differences = (error.diff(dim=2), error.diff(dim=3))
        edges = sum(mean_over_dims(0.05 * d.abs() + 0.3 * d**2) for d in differences)
        per_sample = mean_over_dims(error**2) + edges + 5e-8 * posterior.kl()
        per_sample.mean().backward()
        run.update()
        run.record(per_sample)
        run.note(rms=mean_over_dims(error.detach() ** 2).mean().sqrt())
    whiten(autoencoder, to_float(images[:4096]))


@torch.no_grad()
def whiten(autoencoder: AutoencoderKL, x: Tensor) -> None:
    """Fold the means and spreads of the latents of x (n, 3, S, S) into the 1x1 convolutions around.

    No image changes, and the latents have mean 0 and variance 1 in each channel without a scaling
    factor.
    """
    latents = encode(autoencoder, x).double()
    mean = latents.mean((0, 2, 3))
    std = latents.std((0, 2, 3))
    into = autoencoder.quant_conv
    back = autoencoder.post_quant_conv
    n = len(mean)
    into.weight[:n] /= std[:, None, None, None].to(into.weight)
    into.bias[:n] = ((into.bias[:n].double().cpu() - mean) / std).to(into.bias)
    into.bias[n:] -= 2 * std.log().to(into.bias)  # the log-variances
    back.bias += (back.weight[:, :, 0, 0].double().cpu() @ mean).to(back.bias)
    back.weight *= std[None, :, None, None].to(back.weight)


def train_unet(
    pipe: StableDiffusionXLPipeline,
    captions: Sequence[str],
    latents: Tensor,
    size: int,
    settings: Training,
    out: Path,
    resume: bool = True,
) -> None:
    """Train the pipeline's UNet and text encoders, on latents of images of this size.

    The diffusion loss, weighted half-way between the v- and the epsilon-loss; one caption in ten is
    dropped for guidance.
    """
    device = pipe.unet.device
    schedule, prediction = noise_schedule(pipe.scheduler)
    denoiser = Denoiser(Network(pipe.unet, None), schedule, prediction)
    names = ("unet", "text_encoder", "text_encoder_2")
    modules = nn.ModuleDict({name: getattr(pipe, name) for name in names}).train()
    whole = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    first_ids = pipe.tokenizer(list(captions), **whole).input_ids
    second_ids = pipe.tokenizer_2(list(captions), **whole).input_ids
    sizes = [size, size, 0, 0, size, size]
    time_ids = torch.tensor(sizes, dtype=torch.float32, device=device)
    learner = Learner(dict(modules.named_parameters()), settings.clip, weight_decay=0.01)
    run = Run("teacher", {"teacher": learner}, settings, out, resume)
    for step in run:
        rows = batch_indices(len(captions), settings.batch, step, settings.seed)
        first = pipe.text_encoder(first_ids[rows].to(device), output_hidden_states=True)
        second = pipe.text_encoder_2(second_ids[rows].to(device), output_hidden_states=True)
        kept = (torch.rand(len(rows), device=device) >= 0.1).float()[:, None]
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        pooled = second.text_embeds * kept
        cond = Condition(states * kept[..., None], pooled, time_ids.expand(len(rows), 6))
        output = diffusion_loss(denoiser, latents[rows].to(device), cond)
        per_sample = output.per_sample * schedule(output.t)[0].float()
        per_sample.mean().backward()
        run.update()
        run.record(per_sample, output.t)
    modules.eval()
