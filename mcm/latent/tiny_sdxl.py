"""A real SDXL pipeline, of tiny size, trained from scratch on captioned pictures: minutes on a CPU, no download.

Everything is of the kinds that SDXL is made of: an AutoencoderKL, two CLIP text encoders with two tokenizers, a UNet with
text_time embeddings, the scaled-linear schedule of 1000 steps with its non-zero terminal SNR, epsilon-prediction. What is saved
loads in stock diffusers. Only the sizes differ, and that nobody trained the text encoders before: they learn with the UNet.
"""

import json
import math
import os
import shutil
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
from ..lab.data import to_float
from ..lab.run import Learner, Step, Training, batch_indices, loop
from ..losses import diffusion_loss
from ..solvers import mean_over_dims
from .sdxl import Condition, Network, noise_schedule

SPECIAL = [
    "!",
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
]  # the end must not be id 2: transformers then pools at the largest id instead


def make_tokenizer(captions: Sequence[str], folder: Path, vocabulary: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair vocabulary is learned from these captions; every other text still tokenises."""
    if not (folder / "merges.txt").is_file():  # a run that goes on keeps its tokens
        model, alphabet = (
            CLIPTokenizer({token: i for i, token in enumerate(SPECIAL)}, [])._tokenizer,
            sorted(ByteLevel.alphabet()),
        )
        trainer = BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=SPECIAL,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        model.train_from_iterator(captions, trainer)
        learned = json.loads(model.to_str())["model"]
        # Numbered anew, as the trainer's order is not the same in every run; with single letters that end a word, seen or not.
        tokens = SPECIAL + sorted(
            (set(learned["vocab"]) | {letter + "</w>" for letter in alphabet}) - set(SPECIAL)
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        merges = [" ".join(m) if isinstance(m, list) else m for m in learned["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(m + "\n" for m in merges))
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(m.split(" ")) for m in (folder / "merges.txt").read_text().split("\n")[1:-1]]
    tokenizer = CLIPTokenizer(vocab, merges, pad_token="<|endoftext|>")
    longest = max(len(tokenizer(c).input_ids) for c in captions)
    tokenizer.model_max_length = min(77, 8 * math.ceil(longest / 8))
    return tokenizer


def text_encoder(tokenizer: CLIPTokenizer, width: int, projection: bool) -> nn.Module:
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
    for embedding in (m for m in model.modules() if isinstance(m, nn.Embedding)):
        nn.init.normal_(
            embedding.weight, std=0.5
        )  # CLIP's 0.02 would starve the cross-attention, which reads an unnormalised layer
    return model


def make_unet(
    latent_size: int, width: int, latent_channels: int = 4, channels: Sequence[int] = (64, 128)
) -> UNet2DConditionModel:
    """width: of one text encoder, of two."""
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
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


def train_tiny_sdxl(
    captions: Sequence[str],
    pictures: Tensor,
    out: Path,
    vae: Training,
    unet: Training,
    width: int = 64,
    resume: bool = True,
    latent_channels: int = 4,
    device: str | torch.device = "cpu",
    channels: Sequence[int] = (64, 128),
) -> StableDiffusionXLPipeline:
    """Train a pipeline on pictures (n, 3, S, S) uint8, S a multiple of 8, and their captions; save it in `out` and return it.

    vae, unet: how long to train the two parts. channels: of the UNet's two resolutions. A pipeline that is there already is loaded instead; a run cut short goes on.
    """
    if (out / "model_index.json").is_file():
        return StableDiffusionXLPipeline.from_pretrained(out)
    size = pictures.shape[-1]
    if size % 8:
        raise InputError(
            f"pictures of {size} pixels do not fit the autoencoder: their side must be a multiple of 8"
        )
    work = out.with_name(out.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(vae.seed)
    autoencoder = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=latent_channels,
        mid_block_add_attention=False,
        sample_size=size,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # log-variances start low: noise as loud as the latents would hold up the first thousand steps
        autoencoder.quant_conv.bias[latent_channels:] -= 6
    vocabulary = (
        324 if len(set(captions)) > 4 * len({w for c in captions for w in c.split()}) else 2000
    )
    tokenizers = [
        make_tokenizer(captions, work / name, vocabulary) for name in ("tokenizer", "tokenizer_2")
    ]
    encoders = [text_encoder(tokenizers[0], width, False), text_encoder(tokenizers[1], width, True)]
    network = make_unet(size // 4, width, latent_channels, channels)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )

    for module in (autoencoder, network):  # a quarter faster on a CPU
        module.to(memory_format=torch.channels_last)
    for module in (autoencoder, network, *encoders):
        module.to(device)
    train_autoencoder(autoencoder, pictures, vae, work, resume)
    latents = encode(autoencoder, to_float(pictures))
    train_unet(
        network, encoders, tokenizers, scheduler, captions, latents, size, unet, work, resume
    )

    pipe = StableDiffusionXLPipeline(
        autoencoder,
        *encoders,
        *tokenizers,
        network,
        scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.save_pretrained(work)
    for name in (
        "tokenizer",
        "tokenizer_2",
    ):  # transformers 5 writes only tokenizer.json; versions before it read these two
        for file in ("vocab.json", "merges.txt"):
            assert (work / name / file).is_file()
    for state in work.glob("*.safetensors"):
        state.unlink()
    if out.exists():
        shutil.rmtree(out)
    os.replace(work, out)
    return StableDiffusionXLPipeline.from_pretrained(out)


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, x: Tensor) -> Tensor:
    device = autoencoder.device
    return torch.cat(
        [autoencoder.encode(part.to(device)).latent_dist.mode().cpu() for part in x.split(64)]
    )


def train_autoencoder(
    autoencoder: AutoencoderKL, pictures: Tensor, settings: Training, out: Path, resume: bool
) -> None:
    """Squared errors; absolute and squared errors of the finite differences, which are the edges; a touch of KL. The decoder sees latents
    with noise of 0.15 of their spread, so that it forgives what a UNet gets wrong. At the end the latents are whitened, so that
    scaling_factor = 1 is right."""
    device = autoencoder.device
    learner = Learner(dict(autoencoder.named_parameters()), settings.clip)

    def step(index: int) -> Step:
        x = to_float(
            pictures[batch_indices(len(pictures), settings.batch, index, settings.seed)]
        ).to(device)
        posterior = autoencoder.encode(x).latent_dist
        z = posterior.sample()
        spread = z.detach().std((0, 2, 3), keepdim=True)
        error = autoencoder.decode(z + 0.15 * spread * torch.randn_like(z)).sample - x
        edges = sum(
            mean_over_dims(0.05 * d.abs() + 0.3 * d**2)
            for d in (error.diff(dim=2), error.diff(dim=3))
        )
        per_sample = mean_over_dims(error**2) + edges + 5e-8 * posterior.kl()
        per_sample.mean().backward()
        norm = learner.update(settings.lr_at(index), index)
        return Step(
            per_sample.detach(),
            torch.ones(len(x)),
            norm,
            {"rms": mean_over_dims(error.detach() ** 2).mean().sqrt()},
        )

    loop({"vae": learner}, step, settings, out, "vae", resume, lambda *_: None)
    whiten(autoencoder, to_float(pictures[:4096]))


@torch.no_grad()
def whiten(autoencoder: AutoencoderKL, x: Tensor) -> None:
    """Fold the means and spreads of the latents of x (n, 3, S, S) into the 1x1 convolutions around them: no picture changes, and the
    latents have mean 0 and variance 1 in each channel without a scaling factor."""
    latents = encode(autoencoder, x).double()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, back, channels = autoencoder.quant_conv, autoencoder.post_quant_conv, len(mean)
    into.weight[:channels] /= std[:, None, None, None].to(into.weight)
    into.bias[:channels] = ((into.bias[:channels].double().cpu() - mean) / std).to(into.bias)
    into.bias[channels:] -= 2 * std.log().to(into.bias)  # the log-variances
    back.bias += (back.weight[:, :, 0, 0].double().cpu() @ mean).to(back.bias)
    back.weight *= std[None, :, None, None].to(back.weight)


def train_unet(
    network: UNet2DConditionModel,
    encoders: list[nn.Module],
    tokenizers: list[CLIPTokenizer],
    scheduler: DDIMScheduler,
    captions: Sequence[str],
    latents: Tensor,
    size: int,
    settings: Training,
    out: Path,
    resume: bool,
) -> None:
    """The diffusion loss on latents, weighted half-way between the v- and the epsilon-loss; one caption in ten is dropped for guidance."""
    device = network.device
    schedule, prediction = noise_schedule(scheduler)
    denoiser = Denoiser(Network(network, None), schedule, prediction)
    modules = {"unet": network, "text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    weights = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.named_parameters()
    }
    learner = Learner(weights, settings.clip, weight_decay=0.01)
    ids = [
        t(
            list(captions),
            padding="max_length",
            max_length=t.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for t in tokenizers
    ]
    time_ids = torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32, device=device)
    for module in modules.values():
        module.train()

    def step(index: int) -> Step:
        rows = batch_indices(len(captions), settings.batch, index, settings.seed)
        first, second = (
            encoder(i[rows].to(device), output_hidden_states=True)
            for encoder, i in zip(encoders, ids)
        )
        kept = (torch.rand(len(rows), device=device) >= 0.1).float()
        states = (
            torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1) * kept[:, None, None]
        )
        cond = Condition(states, second.text_embeds * kept[:, None], time_ids.expand(len(rows), 6))
        output = diffusion_loss(denoiser, latents[rows].to(device), cond)
        alpha = schedule(output.t)[0].float()
        (output.per_sample * alpha).mean().backward()
        return Step(
            (output.per_sample * alpha).detach(),
            output.t,
            learner.update(settings.lr_at(index), index),
            {},
        )

    loop({"teacher": learner}, step, settings, out, "teacher", resume, lambda *_: None)
    for module in modules.values():
        module.eval()
