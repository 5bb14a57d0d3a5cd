"""How well does a picture fit its caption: reward(images, prompts) -> (B,), differentiable in the images.

Two of them: a small contrastive scorer that is trained on the spot on captioned pictures, offline, and CLIP from its weights.
The scorer that a student is trained against must not be the one that measures it: train two, with other seeds on other pairs.
"""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoiser import read_safetensors, write_safetensors
from ..errors import InputError
from ..lab.data import to_float
from ..lab.run import Learner, Step, Training, batch_indices, loop


class Reward(Protocol):
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (B, 3, H, W) in [-1, 1]; -> (B,), higher is better, with gradient."""


class Scorer(nn.Module):
    """Two towers, trained so that a picture's own caption scores highest among those of its batch (as CLIP, arXiv 2103.00020).

    Pictures are brought to 32x32. Words, and single Chinese and Japanese
    characters, are hashed into 4,096 rows, so that any text can be given.
    """

    DIM, WORDS, LENGTH = 64, 4096, 32

    def __init__(self, channels: int = 24):
        super().__init__()
        layers, c = [], 3
        for width in (channels, 2 * channels, 4 * channels):
            layers += [
                nn.Conv2d(c, width, 4, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            c = width
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * c, self.DIM))
        self.words, self.places = (
            nn.Embedding(self.WORDS, 64),
            nn.Parameter(torch.randn(self.LENGTH, 64) * 0.5),
        )
        self.text = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True),
            2,
            enable_nested_tensor=False,
        )
        self.from_text, self.from_image = nn.Linear(64, self.DIM), nn.Linear(self.DIM, self.DIM)
        self.temperature = nn.Parameter(torch.tensor(2.3))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 64)."""
        if images.shape[-1] != 32:
            images = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
        return self.image(images)

    def describe(self, prompts: Sequence[str]) -> Tensor:
        """-> (B, 64), of length 1."""
        device = self.places.device
        ids = torch.zeros(len(prompts), self.LENGTH, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            words = re.findall(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+", prompt.lower())[
                : self.LENGTH
            ]
            row[: len(words)] = torch.tensor(
                [1 + zlib.crc32(w.encode()) % (self.WORDS - 1) for w in words], dtype=torch.long
            )
        ids = ids.to(device)
        empty = (ids == 0) & (torch.arange(self.LENGTH, device=device) > 0)
        hidden = self.text(self.words(ids) + self.places, src_key_padding_mask=empty)
        kept = (~empty)[..., None]
        return F.normalize(self.from_text((hidden * kept).sum(1) / kept.sum(1)), dim=1)

    def logits(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 64) and n prompts -> (B, n)."""
        return (
            F.normalize(self.from_image(F.silu(features)), dim=1)
            @ self.describe(prompts).T
            * self.temperature.exp().clamp(max=100)
        )

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        features = F.normalize(self.from_image(F.silu(self.features(images))), dim=1)
        return (features * self.describe(prompts)).sum(1) * self.temperature.exp().clamp(max=100)


def train_scorer(
    pictures: Tensor, captions: Sequence[str], settings: Training, path: Path, resume: bool = True
) -> Scorer:
    """pictures: (n, 3, H, W) uint8, with their captions. Cached at `path`."""
    device = pictures.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(settings.seed)
        scorer = Scorer().to(device)
    if path.is_file():
        try:
            scorer.load_state_dict(read_safetensors(path)[0])
        except RuntimeError:
            raise InputError(f"{path} is not a scorer of this version: delete it") from None
        return scorer.eval().requires_grad_(False)
    learner = Learner(dict(scorer.named_parameters()), settings.clip, weight_decay=0.05)

    def step(index: int) -> Step:
        rows = batch_indices(len(pictures), settings.batch, index, settings.seed)
        x, texts = to_float(pictures[rows.to(device)]), [captions[i] for i in rows]
        logits, which = (
            scorer.logits(scorer.features(x), texts),
            {c: i for i, c in enumerate(texts)},
        )
        own = torch.tensor([which[c] for c in texts], device=device)
        per_sample = F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(
            logits.T, torch.arange(len(x), device=device), reduction="none"
        )
        per_sample.mean().backward()
        return Step(
            per_sample.detach(),
            torch.ones(len(x)),
            learner.update(settings.lr_at(index), index),
            {"right": (logits.argmax(1) == own).float().mean()},
        )

    path.parent.mkdir(parents=True, exist_ok=True)
    loop({"scorer": learner}, step, settings, path.parent, path.stem, resume, lambda *_: None)
    write_safetensors(path, scorer.state_dict(), {"kind": "scorer"})
    return scorer.eval().requires_grad_(False)


class CLIPReward(nn.Module):
    """CLIP's score, 100 times the cosine, through transformers. source: a folder or hub id."""

    def __init__(self, source: str, device: torch.device):
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel

        try:
            self.model, self.tokenizer = (
                CLIPModel.from_pretrained(source).to(device).eval().requires_grad_(False),
                AutoTokenizer.from_pretrained(source),
            )
        except Exception as error:
            raise InputError(
                f"no CLIP model at {source} ({str(error).splitlines()[0]}). Without a network, pass a folder that holds one"
            ) from None

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        size = self.model.config.vision_config.image_size
        x = F.interpolate(
            (images.clamp(-1, 1) + 1) / 2, size=(size, size), mode="bicubic", antialias=True
        )
        mean, std = (
            torch.tensor(v, device=x.device)[:, None, None]
            for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        )
        ids = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(
            x.device
        )
        output = self.model(pixel_values=(x - mean) / std, **ids)
        return 100 * (output.image_embeds * output.text_embeds).sum(1)
