"""The thin adapter: any StableDiffusionXLPipeline as denoisers that losses and samplers understand.

One UNet carries several sets of weights under names: None is the pipeline's own (the teacher), and
"student", "target", "average", ... are LoRAs on it, switched on only while they are asked; or, with
full fine-tuning, copies of the UNet. Text is encoded once and kept; the VAE is used only to encode
images that are given and to decode images that are wanted.
"""

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..denoiser import Denoiser
from ..errors import InputError
from ..lab.data import cat_on_disk, to_float
from ..schedule import DiscreteSchedule
from .scheduler import prediction_of

# The 14 module kinds of LCM-LoRA, which TLCM's release uses too.
MODULES = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
).split()
DECODER = r"(up_blocks\..*\.(" + "|".join(m.replace(".", r"\.") for m in MODULES) + r")|conv_out)"
LORA_FILE = "pytorch_lora_weights.safetensors"
OMEGA_CHANNELS = 256  # of the embedding of the guidance scale, as diffusers' pipelines compute it


class Condition(NamedTuple):
    """What an SDXL UNet is told.

    states: (B, tokens, width) of both text encoders; pooled: (B, width); time_ids: (B, 6);
    omega: (B,) the guidance scale w - 1 for students that take it, or None.
    """

    states: Tensor
    pooled: Tensor
    time_ids: Tensor
    omega: Tensor | None = None


def unconditional(cond: Condition, empty: Condition | None = None) -> Condition:
    """What "no text" is: zeros (as force_zeros_for_empty_prompt does), or `empty`, the encoded "".

    The time ids stay.
    """
    if empty is None:
        states, pooled = torch.zeros_like(cond.states), torch.zeros_like(cond.pooled)
    else:
        states = empty.states.to(cond.states).expand_as(cond.states)
        pooled = empty.pooled.to(cond.pooled).expand_as(cond.pooled)
    return cond._replace(states=states, pooled=pooled)


# UNet -> the names of the LoRAs that are on: one list, which all its layers share. (Telling 794
# layers one by one took a fifth of the host's time in a step.)
SWITCHED_ON: WeakKeyDictionary = WeakKeyDictionary()


def share_switch(unet: nn.Module) -> None:
    """All LoRAs of this UNet off, and its layers, also new ones, under one switch."""
    names = SWITCHED_ON[unet] = []
    for layer in unet.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._active_adapter = names
            layer.cast_input_dtype_enabled = False  # to float32 and back: autocast does what's due


def switched_on(unet: nn.Module) -> list[str]:
    return list(SWITCHED_ON.get(unet, []))


def switch(unet: nn.Module, names: list[str]) -> None:
    """These LoRAs on, all others off."""
    SWITCHED_ON.setdefault(unet, [])[:] = names


@contextmanager
def active(unet: nn.Module, names: list[str]) -> Iterator[None]:
    """Within this block these LoRAs, and no others, are on.

    What requires gradients does not change (unlike with peft's set_adapter), so that a student's
    backward pass may come after its teacher was asked.
    """
    before = switched_on(unet)
    if before == names:
        yield
        return
    switch(unet, names)
    try:
        yield
    finally:
        switch(unet, before)


def checkpoint_gradients(unet: UNet2DConditionModel) -> None:
    """Trade time for memory: recompute activations in the backward pass.

    Under the LoRA that was on in the forward pass. (By default they are recomputed under whichever
    is on later, and the gradients are silently wrong.)
    """

    def run(block, *inputs):
        under_the_same = partial(_under, unet, switched_on(unet), block)
        return checkpoint(under_the_same, *inputs, use_reentrant=False)

    unet.enable_gradient_checkpointing(run)


def _under(unet: nn.Module, names: list[str], block: nn.Module, *inputs):
    with active(unet, names):
        return block(*inputs)


class Network(nn.Module):
    """network(z, index, cond) for a Denoiser: the UNet under one set of weights.

    z: (B, 4, H, W); index: (B,) of the schedule. A UNet in bfloat16 computes under autocast, as its
    LoRAs are float32; one in float32 as the caller does. Raises InputError if omega is missing.
    """

    def __init__(self, unet: UNet2DConditionModel, name: str | None):
        super().__init__()
        self.unet = unet
        self.names = [] if name is None else [name]

    def forward(self, z: Tensor, index: Tensor, cond: Condition) -> Tensor:
        omega = None
        channels = self.unet.config.time_cond_proj_dim
        if channels:
            if cond.omega is None:
                raise InputError(
                    "this UNet takes the guidance scale as an input: pass a condition with omega"
                )
            how = {"flip_sin_to_cos": False, "downscale_freq_shift": 1}
            omega = get_timestep_embedding(cond.omega.float() * 1000, channels, **how).to(z.dtype)
        added = {"text_embeds": cond.pooled.to(z.dtype), "time_ids": cond.time_ids.to(z.dtype)}
        dtype = self.unet.conv_in.weight.dtype
        autocast: AbstractContextManager = nullcontext()
        if dtype != torch.float32:
            autocast = torch.autocast(z.device.type, dtype, cache_enabled=False)
        with active(self.unet, self.names), autocast:
            more = {"timestep_cond": omega, "added_cond_kwargs": added}
            return self.unet(z, index, cond.states.to(z.dtype), **more).sample


@dataclass(eq=False)
class SDXL:
    """A pipeline and the sets of weights trained on it.

    rank: of the LoRAs; their alpha is the same, so that every loader agrees on a strength of 1.
    checkpointing: gradient checkpointing.
    Raises InputError for a noise schedule or a rank that cannot work.
    """

    pipe: StableDiffusionXLPipeline
    rank: int
    checkpointing: bool = False

    def __post_init__(self):
        pipe = self.pipe
        self.device = pipe.unet.device
        self.unet = pipe.unet.requires_grad_(False).eval()
        self.schedule, self.prediction = noise_schedule(pipe.scheduler)
        self.unets: dict[str | None, UNet2DConditionModel] = {None: self.unet}
        self.size = pipe.unet.config.sample_size
        self.channels = pipe.unet.config.in_channels
        self._check_rank()
        for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            if part is not None:
                part.requires_grad_(False).eval()
        zeros = pipe.config.force_zeros_for_empty_prompt
        self.unconditional = partial(unconditional, empty=None if zeros else self.encode([""]))
        if self.checkpointing:
            checkpoint_gradients(self.unet)
            pipe.vae.enable_gradient_checkpointing()
            # diffusers checkpoints only then; there is nothing else in it that training changes
            pipe.vae.train()

    def add_copy(
        self, name: str, like: str | None = None, guidance_input: bool = False
    ) -> dict[str, nn.Parameter]:
        """A new set of weights that starts as `like` (None: the teacher): a copy of the whole UNet.

        With guidance_input it takes omega. -> its parameters by name.
        """
        source = self.unets[like]
        # diffusers would reset an argument to its default because it once had it
        config = {k: v for k, v in source.config.items() if k != "_use_default_values"}
        unet = UNet2DConditionModel.from_config(config).to(self.device)
        # without LoRAs that critics may have on it, or leave behind
        kept = {k: v for k, v in source.state_dict().items() if "lora_" not in k}
        unet.load_state_dict({k.replace(".base_layer.", "."): v for k, v in kept.items()})
        if guidance_input and not unet.config.time_cond_proj_dim:
            give_guidance_input(unet)
        unet.requires_grad_(True).eval()
        self.unets[name] = unet.to(memory_format=torch.channels_last)
        if self.checkpointing:
            checkpoint_gradients(unet)
        return self.weights(name)

    def add_lora(
        self, name: str, like: str | None = None, modules: list[str] | str = MODULES
    ) -> dict[str, nn.Parameter]:
        """A new set of weights that starts as `like` (None: the teacher): a LoRA on these layers.

        -> its parameters by name.
        """
        lora = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=modules,
            init_lora_weights="gaussian",
        )
        with warnings.catch_warnings():
            # peft: "this will lead to having multiple adapters", which is the idea
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            self.unet.add_adapter(lora, name)
        self.unets[name] = self.unet
        weights = self.weights(name)
        source = {} if like is None else self.weights(like)
        with torch.no_grad():
            for key, value in weights.items():
                value.data = value.data.float()
                if source:
                    value.copy_(source[key])
        # all off, and all trainable: peft has switched the new one on and frozen the others
        share_switch(self.unet)
        for key, value in self.unet.named_parameters():
            value.requires_grad_("lora_" in key)
        return weights

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of a set of weights by name; the names do not contain the set's."""
        if self.unets[name] is not self.unet:
            return dict(self.unets[name].named_parameters())
        marks = (f"lora_A.{name}.", f"lora_B.{name}.")
        named = self.unet.named_parameters()
        return {k.replace(f".{name}.", "."): v for k, v in named if any(m in k for m in marks)}

    def remove(self, name: str) -> None:
        """Forget a set of weights."""
        if self.unets.pop(name) is self.unet:
            self.unet.delete_adapters(name)
            share_switch(self.unet)

    def remove_all(self) -> None:
        """Forget all but the teacher's."""
        for name in [name for name in self.unets if name]:
            self.remove(name)

    def denoiser(self, name: str | None = None) -> Denoiser:
        """The teacher (None) or another set of weights, as a denoiser."""
        return Denoiser(Network(self.unets[name], name), self.schedule, self.prediction)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], folder: Path | None = None) -> Condition:
        """Prompts -> conditions, on the CPU, computed once.

        folder: keep the states there instead of in memory, where SDXL's are 0.3 MB a prompt.
        """
        pooled = []

        def states() -> Iterator[Tensor]:
            for start in range(0, len(prompts), 64):
                how = {"device": self.device, "do_classifier_free_guidance": False}
                texts = list(prompts[start : start + 64])
                encoded, _, pooled_part, _ = self.pipe.encode_prompt(texts, **how)
                pooled.append(pooled_part.cpu())
                yield encoded.cpu()

        size = self.size * self.pipe.vae_scale_factor
        ids = torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32)
        kept = cat_on_disk(states(), folder)
        return Condition(kept, torch.cat(pooled), ids.expand(len(prompts), 6))

    @torch.no_grad()
    def to_latents(self, images: Tensor, folder: Path | None = None) -> Tensor:
        """images (n, 3, H, W), uint8 or float in [-1, 1] -> latents (n, 4, h, w), on the CPU.

        The means, scaled. folder: as in `encode`.
        """
        vae = self.pipe.vae

        def latents() -> Iterator[Tensor]:
            for part in images.split(max(1, 2**16 // images[0, 0].numel())):
                part = to_float(part) if part.dtype == torch.uint8 else part
                posterior = vae.encode(part.to(self.device, vae.dtype)).latent_dist
                yield (posterior.mode().float() * vae.config.scaling_factor).cpu()

        return cat_on_disk(latents(), folder)

    def fingerprint(self) -> str:
        """12 hex digits that change with the pipeline's weights, from the first few of each."""
        total = hashlib.sha256()
        for part in (self.unet, self.pipe.vae):
            for key, value in part.state_dict().items():
                if "lora_" not in key:
                    row = value[(0,) * (value.ndim - 1)][:16]
                    total.update(row.float().cpu().numpy().tobytes())
        return total.hexdigest()[:12]

    def to_images(self, latents: Tensor) -> Tensor:
        """latents (n, 4, h, w) -> images (n, 3, H, W) in [-1, 1], with gradient."""
        vae = self.pipe.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        # autocast would keep its norms' inputs in float32: twice the memory
        with torch.autocast(self.device.type, enabled=False):
            return vae.decode(scaled, return_dict=False)[0].float()

    def save(self, out: Path, name: str = "average") -> None:
        """Write these weights for stock diffusers: out/pytorch_lora_weights.safetensors, or
        out/unet.
        """
        if self.unets[name] is not self.unet:
            self.unets[name].save_pretrained(out / "unet", max_shard_size="20GB")
            return
        # not converted: a mixed file would lose its attention layers
        layers = get_peft_model_state_dict(self.unet, adapter_name=name)
        config: dict = {"r": self.rank, "lora_alpha": self.rank, "target_modules": MODULES}
        config |= {"rank_pattern": {}, "alpha_pattern": {}}  # diffusers before 0.40 looks for them
        StableDiffusionXLPipeline.save_lora_weights(
            out, unet_lora_layers=layers, unet_lora_adapter_metadata=config
        )

    def load(self, name: str, out: Path, full: bool = False) -> None:
        """Take back, under this name, weights that `save` wrote to `out`. Raises InputError."""
        if full:
            unet = UNet2DConditionModel.from_pretrained(out / "unet")
            self.unets[name] = unet.to(self.device, memory_format=torch.channels_last)
            return
        tensors = read_lora(out)
        weights = self.add_lora(name)
        shapes = {f"unet.{key}": value.shape for key, value in weights.items()}
        if {key: value.shape for key, value in tensors.items()} != shapes:
            raise InputError(f"{out} holds a LoRA of other layers, or of another rank")
        with torch.no_grad():
            for key, value in weights.items():
                value.copy_(tensors[f"unet.{key}"])

    def _check_rank(self) -> None:
        """A rank beyond a layer's width buys nothing, and is a mistake."""
        kinds = tuple(f".{kind}" for kind in MODULES)
        for key, module in self.unet.named_modules():
            if key.endswith(kinds) and isinstance(module, (nn.Linear, nn.Conv2d)):
                most = min(module.weight.shape[0], module.weight[0].numel())
                if self.rank > most:
                    raise InputError(f"rank {self.rank} is more than {key} can use: at most {most}")


def read_lora(folder: Path) -> dict[str, Tensor]:
    """The tensors of a LoRA in the format that `SDXL.save` writes, unet.LAYER.lora_A.weight.

    Raises InputError for others, which stock diffusers would load in part, or not at all, with no
    more than a warning: raw PEFT files (base_model.model. ...), or two namings in one file.
    """
    path = folder / LORA_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing: not the folder of a saved student")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"{path} is not readable ({error}): truncated, or no safetensors"
        ) from None
    others = [key for key in tensors if not re.match(r"unet\..*\.lora_[AB]\.weight$", key)]
    if others or not tensors:
        raise InputError(
            f"{path} is not what SDXL.save writes, a LoRA with tensors unet.LAYER.lora_A.weight: "
            f"{len(others)} of {len(tensors)} have other names, as {others[:1]}"
        )
    return tensors


def give_guidance_input(unet: UNet2DConditionModel) -> None:
    """Let a UNet take the embedding of omega (arXiv 2310.04378).

    A linear layer into its time embedding, zero at first.
    """
    embedding = unet.time_embedding
    weight = embedding.linear_1.weight
    projection = nn.Linear(OMEGA_CHANNELS, weight.shape[1], bias=False)
    nn.init.zeros_(projection.weight)
    embedding.cond_proj = projection.to(weight.device, weight.dtype)
    unet.register_to_config(time_cond_proj_dim=OMEGA_CHANNELS)


def noise_schedule(scheduler) -> tuple[DiscreteSchedule, str]:
    """-> the schedule that the pipeline's UNet was trained with, its prediction type in our words.

    Raises InputError for what is not supported.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise InputError(f"{name} has no alphas_cumprod: SDXL's kind of schedule is needed")
    for key, usual in DISCRETE.items():
        if config.get(key, usual) != usual:
            raise InputError(
                f"{name} with {key} {config[key]}: such a UNet was trained at other noise levels "
                f"than alphas_cumprod says; a schedule of SDXL's kind has {key} {usual}"
            )
    return DiscreteSchedule(scheduler.alphas_cumprod), prediction_of(config)


# what makes diffusers compute noise levels otherwise than from alphas_cumprod, and its default
DISCRETE = {
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
    "use_flow_sigmas": False,
}

PARTS = "unet vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler".split()


def load_pipeline(
    source: str, dtype: torch.dtype, device: torch.device
) -> StableDiffusionXLPipeline:
    """A pipeline from a folder or a hub id.

    Raises InputError if it is not there or is not an SDXL pipeline, which a few small files tell
    before any weights are fetched.
    """
    with explained(source):
        check_kind(source)
        pipe = with_any_variant(source, torch_dtype=dtype)
    for n in ("", "_2"):
        check_vocabulary(source, getattr(pipe, f"tokenizer{n}"), getattr(pipe, f"text_encoder{n}"))
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    return pipe.to(device)


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Whatever a loader raises becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = "the folder is damaged"
        if not Path(source).exists():
            where = "the hub did not give it; without a network, pass a folder with a pipeline"
        raise InputError(f"{source} could not be loaded: {where} ({reason})") from None


def check_kind(source: str) -> None:
    """Raises InputError, naming what it is, for anything but an SDXL text-to-image pipeline."""
    if Path(source).exists() and not (Path(source) / "model_index.json").is_file():
        what = "it is not a saved diffusers pipeline"
        if Path(source).is_file():
            what = "one file; StableDiffusionXLPipeline.from_single_file reads it, and its "
            what += "save_pretrained(FOLDER) writes what is needed here"
        raise InputError(f"{source} has no model_index.json: {what}")
    index = StableDiffusionXLPipeline.load_config(source)
    missing = [part for part in PARTS if not (index.get(part) or [None])[0]]
    if missing:
        kind = index.get("_class_name")
        refiner = missing == ["text_encoder", "tokenizer"]
        hint = " (an SDXL refiner? The base model is needed)" if refiner else ""
        raise InputError(
            f"{source} is a {kind}, and no SDXL pipeline: no {', '.join(missing)}{hint}"
        )
    unet = UNet2DConditionModel.load_config(source, subfolder="unet")
    kind = unet.get("addition_embed_type")
    if kind != "text_time":
        raise InputError(f"{source} has a UNet of addition_embed_type {kind!r}, not 'text_time'")
    channels = unet.get("in_channels", 4)
    if channels != unet.get("out_channels", 4):
        raise InputError(
            f"{source} has a UNet that reads {channels} channels (for inpainting, or to edit "
            "images): one for text to image is needed, which reads as many as it writes"
        )
    vae = AutoencoderKL.load_config(source, subfolder="vae")
    if vae.get("latents_mean") or vae.get("latents_std"):
        raise InputError(f"{source} has a VAE with latents_mean or latents_std: not supported")
    scheduler = getattr(diffusers, index["scheduler"][1])
    noise_schedule(scheduler.from_pretrained(source, subfolder="scheduler"))


def with_any_variant(source: str, **how) -> StableDiffusionXLPipeline:
    """From its files, or from those called fp16 where there are no others."""
    with warnings.catch_warnings():
        # newer versions of diffusers call the argument dtype; all know this name
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
        try:
            return StableDiffusionXLPipeline.from_pretrained(source, **how)
        except OSError:
            with suppress(OSError, ValueError):
                pipe = StableDiffusionXLPipeline.from_pretrained(source, variant="fp16", **how)
                print(f"{source} has fp16 files only: those are used")
                return pipe
            raise


def check_vocabulary(source: str, tokenizer, encoder: nn.Module) -> None:
    """Raises InputError for a tokenizer that lost files: all prompts would be encoded alike."""
    known, wanted = len(tokenizer), encoder.config.vocab_size
    words = [word for word in tokenizer.get_vocab() if re.fullmatch(r"[a-z]{4,}</w>", word)]
    word = max(words, key=len, default="")
    whole = tokenizer.tokenize(word.removesuffix("</w>")) == [word] if word else True
    if not 0.9 * wanted <= known <= wanted or not whole:
        raise InputError(
            f"{source} has a tokenizer of {known:,} entries{'' if whole else ' without merges'}, "
            f"and a text encoder for {wanted:,}: tokenizer files are missing"
        )
