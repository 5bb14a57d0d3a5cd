"""The thin adapter: any StableDiffusionXLPipeline as denoisers that the losses and samplers understand.

One UNet carries several sets of weights under names: None is the pipeline's own (the teacher), and "student", "target", "average",
... are LoRAs on it, switched on only while they are asked; or, with full fine-tuning, copies of the UNet. Text is encoded once
and kept; the VAE is used only to encode images that are given and to decode images that are wanted.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..denoiser import Denoiser
from ..errors import InputError
from ..lab.data import collected
from ..schedule import DiscreteSchedule

# The 14 module kinds of LCM-LoRA, which TLCM's release uses too.
MODULES = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]
DECODER = r"(up_blocks\..*\.(" + "|".join(m.replace(".", r"\.") for m in MODULES) + r")|conv_out)"
LORA_FILE = "pytorch_lora_weights.safetensors"
OMEGA_CHANNELS = 256  # of the embedding of the guidance scale (arXiv 2310.04378), as diffusers' pipelines compute it


class Condition(NamedTuple):
    """What an SDXL UNet is told. states: (B, tokens, width) of both text encoders; pooled: (B, width); time_ids: (B, 6); omega: (B,)
    the guidance scale w - 1 for students that take it, or None."""

    states: Tensor
    pooled: Tensor
    time_ids: Tensor
    omega: Tensor | None = None


def unconditional(cond: Condition) -> Condition:
    """Zeros in place of the text, the same time ids (the pipeline's force_zeros_for_empty_prompt)."""
    return cond._replace(states=torch.zeros_like(cond.states), pooled=torch.zeros_like(cond.pooled))


LORA_LAYERS: WeakKeyDictionary = (
    WeakKeyDictionary()
)  # UNet -> its layers with LoRAs: finding them takes a walk over 20,000 modules


def lora_layers(unet: nn.Module) -> list[BaseTunerLayer]:
    if unet not in LORA_LAYERS:
        LORA_LAYERS[unet] = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]
    return LORA_LAYERS[unet]


@contextmanager
def active(unet: nn.Module, name: str | None) -> Iterator[None]:
    """Within this block the LoRA of this name, and no other, is on. What requires gradients does not change (unlike with
    peft's set_adapter), so that a student's backward pass may come after its teacher was asked."""
    layers, wanted = lora_layers(unet), [] if name is None else [name]
    before = (
        layers[0]._active_adapter if layers else wanted
    )  # all layers always have the same ones on
    if before == wanted:
        yield
        return
    for layer in layers:
        layer._active_adapter = wanted
    try:
        yield
    finally:
        for layer in layers:
            layer._active_adapter = before


def checkpoint_gradients(unet: UNet2DConditionModel) -> None:
    """Trade time for memory: recompute activations in the backward pass, under the LoRA that was on in the forward pass. (By default
    they are recomputed under whichever is on later, and the gradients are silently wrong.)"""

    def run(block, *args):
        layers = lora_layers(unet)
        name = layers[0]._active_adapter if layers else None

        def under_the_same(*inputs):
            with active(unet, name[0] if name else None):
                return block(*inputs)

        return checkpoint(under_the_same, *args, use_reentrant=False)

    unet.enable_gradient_checkpointing(run)


class Network(nn.Module):
    """network(z, index, cond) for a Denoiser: the UNet under one set of weights. z: (B, 4, H, W); index: (B,) of the schedule."""

    def __init__(self, unet: UNet2DConditionModel, name: str | None):
        super().__init__()
        self.unet, self.name = unet, name

    def forward(self, z: Tensor, index: Tensor, cond: Condition) -> Tensor:
        omega = None
        if self.unet.config.time_cond_proj_dim:
            if cond.omega is None:
                raise InputError(
                    "this UNet takes the guidance scale as an input: pass a condition with omega"
                )
            omega = get_timestep_embedding(
                cond.omega.float() * 1000,
                self.unet.config.time_cond_proj_dim,
                flip_sin_to_cos=False,
                downscale_freq_shift=1,
            ).to(z.dtype)
        added = {"text_embeds": cond.pooled.to(z.dtype), "time_ids": cond.time_ids.to(z.dtype)}
        with active(self.unet, self.name):
            return self.unet(
                z,
                index,
                cond.states.to(z.dtype),
                timestep_cond=omega,
                added_cond_kwargs=added,
                return_dict=False,
            )[0]


class SDXL:
    """A pipeline and the sets of weights trained on it.

    rank: of the LoRAs; alpha: their strength times the rank, by default the rank, so that every loader agrees on a strength of 1.
    checkpointing: gradient checkpointing. Raises InputError for a noise schedule or a rank that cannot work.
    """

    def __init__(
        self,
        pipe: StableDiffusionXLPipeline,
        rank: int,
        alpha: float | None = None,
        checkpointing: bool = False,
    ):
        self.pipe, self.rank, self.alpha, self.checkpointing = (
            pipe,
            rank,
            rank if alpha is None else alpha,
            checkpointing,
        )
        self.device, self.unet = pipe.unet.device, pipe.unet.requires_grad_(False).eval()
        self.schedule, self.prediction = noise_schedule(pipe.scheduler)
        self.unets: dict[str | None, UNet2DConditionModel] = {None: self.unet}
        self.size, self.channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
        self._check_rank()
        for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            if part is not None:
                part.requires_grad_(False).eval()
        if checkpointing:
            checkpoint_gradients(self.unet)
            pipe.vae.enable_gradient_checkpointing()
            pipe.vae.train()  # diffusers checkpoints only then; there is nothing else in it that training changes

    def add(
        self,
        name: str,
        like: str | None = None,
        modules: list[str] | str = MODULES,
        full: bool = False,
        guidance_input: bool = False,
    ) -> dict[str, nn.Parameter]:
        """A new set of weights that starts as `like` (None: the teacher). -> its parameters by name.

        modules: which layers get a LoRA. full: a copy of the whole UNet instead; with guidance_input it takes omega as an input.
        """
        if full:
            source = self.unets[like]
            # (diffusers would reset an argument to its default because it once had it)
            unet = UNet2DConditionModel.from_config(
                {k: v for k, v in source.config.items() if k != "_use_default_values"}
            ).to(self.device)
            # without LoRAs that critics may have on it, or leave behind
            unet.load_state_dict(
                {
                    k.replace(".base_layer.", "."): v
                    for k, v in source.state_dict().items()
                    if "lora_" not in k
                }
            )
            if guidance_input and not unet.config.time_cond_proj_dim:
                give_guidance_input(unet)
            self.unets[name] = (
                unet.requires_grad_(True).eval().to(memory_format=torch.channels_last)
            )
            if self.checkpointing:
                checkpoint_gradients(unet)
            return self.weights(name)
        with (
            warnings.catch_warnings()
        ):  # peft: "this will lead to having multiple adapters", which is the idea
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            self.unet.add_adapter(
                LoraConfig(
                    r=self.rank,
                    lora_alpha=self.alpha,
                    target_modules=modules,
                    init_lora_weights="gaussian",
                ),
                name,
            )
        self.unets[name] = self.unet
        LORA_LAYERS.pop(self.unet, None)
        weights, source = self.weights(name), {} if like is None else self.weights(like)
        with torch.no_grad():
            for key, value in weights.items():
                value.data = value.data.float()
                if source:
                    value.copy_(source[key])
        for layer in lora_layers(
            self.unet
        ):  # all off, and all trainable: peft has switched the new one on and frozen the others
            layer._active_adapter = []
        for key, value in self.unet.named_parameters():
            value.requires_grad_("lora_" in key)
        return weights

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of a set of weights by name; the names do not contain the set's."""
        if self.unets[name] is not self.unet:
            return dict(self.unets[name].named_parameters())
        return {
            k.replace(f".{name}.", "."): v
            for k, v in self.unet.named_parameters()
            if f"lora_A.{name}." in k or f"lora_B.{name}." in k
        }

    def remove(self, name: str) -> None:
        """Forget a set of weights."""
        if self.unets.pop(name) is self.unet:
            self.unet.delete_adapters(name)
            for layer in lora_layers(self.unet):
                layer._active_adapter = []

    def denoiser(self, name: str | None = None) -> Denoiser:
        """The teacher (None) or another set of weights, as a denoiser."""
        return Denoiser(Network(self.unets[name], name), self.schedule, self.prediction)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        size: int | None = None,
        chunk: int = 64,
        folder: Path | None = None,
    ) -> Condition:
        """Prompts -> conditions, on the CPU, computed once. size: image side in pixels, for the time ids. folder: keep the states there
        instead of in memory, where SDXL's are 0.3 MB a prompt."""
        pooled = []

        def states() -> Iterator[Tensor]:
            for start in range(0, len(prompts), chunk):
                part, _, of_part, _ = self.pipe.encode_prompt(
                    list(prompts[start : start + chunk]),
                    device=self.device,
                    do_classifier_free_guidance=False,
                )
                pooled.append(of_part.cpu())
                yield part.cpu()

        size = size or self.size * self.pipe.vae_scale_factor
        ids = torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32).expand(
            len(prompts), 6
        )
        return Condition(collected(states(), folder), torch.cat(pooled), ids)

    @torch.no_grad()
    def to_latents(self, images: Tensor, folder: Path | None = None) -> Tensor:
        """images: (n, 3, H, W) float in [-1, 1] or uint8 -> latents (n, 4, h, w), on the CPU: the means, scaled. folder: as in `encode`."""
        vae = self.pipe.vae

        def latents() -> Iterator[Tensor]:
            for part in images.split(max(1, 2**16 // images[0, 0].numel())):
                part = part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part
                yield (
                    vae.encode(part.to(self.device, vae.dtype)).latent_dist.mode().float()
                    * vae.config.scaling_factor
                ).cpu()

        return collected(latents(), folder)

    def to_images(self, latents: Tensor) -> Tensor:
        """latents (n, 4, h, w) -> images (n, 3, H, W) in [-1, 1], with gradient."""
        vae = self.pipe.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[
            0
        ].float()

    def save(self, out: Path, name: str = "average") -> None:
        """Write this set of weights for stock diffusers: out/pytorch_lora_weights.safetensors, or out/unet."""
        if self.unets[name] is not self.unet:
            self.unets[name].save_pretrained(out / "unet", max_shard_size="20GB")
            return
        layers = get_peft_model_state_dict(
            self.unet, adapter_name=name
        )  # not converted: a mixed file would lose its attention layers
        config = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": MODULES}
        StableDiffusionXLPipeline.save_lora_weights(
            out, unet_lora_layers=layers, unet_lora_adapter_metadata=config
        )

    def load(self, name: str, out: Path, full: bool = False) -> None:
        """Take back, under this name, weights that `save` wrote to `out`."""
        if full:
            self.unets[name] = UNet2DConditionModel.from_pretrained(out / "unet").to(
                self.device, memory_format=torch.channels_last
            )
            return
        tensors = read_lora(out)
        weights = self.add(name)
        shapes = {f"unet.{key}": value.shape for key, value in weights.items()}
        if {key: value.shape for key, value in tensors.items()} != shapes:
            raise InputError(
                f"{out} holds a LoRA of other layers or of another rank than {self.rank}: it belongs to another pipeline or run"
            )
        with torch.no_grad():
            for key, value in weights.items():
                value.copy_(tensors[f"unet.{key}"])

    def _check_rank(self) -> None:
        """A rank beyond a layer's width buys nothing, and is a mistake."""
        for key, module in self.unet.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and key.endswith(
                tuple(f".{m}" for m in MODULES)
            ):
                most = min(module.weight.shape[0], module.weight[0].numel())
                if self.rank > most:
                    raise InputError(
                        f"rank {self.rank} is larger than layer {key} ({tuple(module.weight.shape)}) can use: choose at most {most}"
                    )


def read_lora(folder: Path) -> dict[str, Tensor]:
    """The tensors of a LoRA in the format that `SDXL.save` writes, unet.LAYER.lora_A.weight. Raises InputError for others, which stock
    diffusers would load in part, or not at all, with no more than a warning."""
    path = folder / LORA_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing: not the folder of a saved student")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"{path} is not readable ({error}): truncated, or another format"
        ) from None
    if any(key.startswith("base_model.model.") for key in tensors):
        raise InputError(
            f"{path} is a raw PEFT file (its keys start with base_model.model.), of which diffusers' load_lora_weights loads nothing. "
            "Rename base_model.model. to unet. and store lora_alpha: SDXL.save does both."
        )
    new, old = (any(part in key for key in tensors) for part in (".lora_A.", ".lora.down."))
    if new and old:
        raise InputError(
            f"{path} mixes two naming schemes (lora_A and lora.down), of which diffusers' load_lora_weights drops one without an error. "
            "Save get_peft_model_state_dict(unet) without converting it, as SDXL.save does."
        )
    if not new or not all(key.startswith("unet.") for key in tensors):
        raise InputError(
            f"{path} is not a LoRA of a UNet in PEFT's naming (unet.LAYER.lora_A.weight)"
        )
    return tensors


def give_guidance_input(unet: UNet2DConditionModel) -> None:
    """Let a UNet take the embedding of omega (arXiv 2310.04378): a linear layer into its time embedding, zero at first."""
    linear = unet.time_embedding.linear_1
    unet.time_embedding.cond_proj = nn.Linear(OMEGA_CHANNELS, linear.in_features, bias=False).to(
        linear.weight.device, linear.weight.dtype
    )
    nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    unet.register_to_config(time_cond_proj_dim=OMEGA_CHANNELS)


def noise_schedule(scheduler) -> tuple[DiscreteSchedule, str]:
    """-> the schedule that the pipeline's UNet was trained with, and its prediction type in our words. Raises InputError otherwise."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if alphas is None:
        raise InputError(
            f"{type(scheduler).__name__} has no alphas_cumprod: only variance-preserving schedules of discrete steps (as SDXL's) are supported"
        )
    known = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x"}
    if kind not in known:
        raise InputError(f"prediction type {kind!r} is not supported: {', '.join(known)} are")
    return DiscreteSchedule(alphas), known[kind]


def load_pipeline(
    source: str, dtype: torch.dtype, device: torch.device
) -> StableDiffusionXLPipeline:
    """A pipeline from a folder or a hub id. Raises InputError if it is not there or is not an SDXL pipeline."""
    path = Path(source)
    if path.exists():
        index = path / "model_index.json"
        if not index.is_file():
            raise InputError(
                f"{source} has no model_index.json: it is not a saved diffusers pipeline"
            )
        kind = json.loads(index.read_text())
        missing = [
            part
            for part in (
                "unet",
                "vae",
                "text_encoder",
                "text_encoder_2",
                "tokenizer",
                "tokenizer_2",
                "scheduler",
            )
            if part not in kind
        ]
        if missing:
            raise InputError(
                f"{source} is a {kind.get('_class_name', 'pipeline of no name')}, not an SDXL pipeline: it has no {', '.join(missing)}"
            )
    try:
        with (
            warnings.catch_warnings()
        ):  # newer versions of diffusers call the argument dtype; all know this name
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
            pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = (
            "the folder is damaged"
            if path.exists()
            else "it is no folder here, and the hub did not give it. Without a network, pass a folder that holds a saved pipeline"
        )
        raise InputError(f"{source} could not be loaded: {where} ({reason})") from None
    if pipe.unet.config.addition_embed_type != "text_time":
        raise InputError(
            f"{source} is a {type(pipe).__name__} whose UNet has addition_embed_type {pipe.unet.config.addition_embed_type!r}; SDXL's is 'text_time'"
        )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    return pipe.to(device)
