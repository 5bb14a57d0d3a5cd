"""How well does an image fit its caption: reward(images, prompts) -> (B,), with gradient.

Two of them: a small contrastive scorer that is trained on the spot on captioned images, offline,
and CLIP from its weights. The scorer that a student is trained against must not be the one that
measures it: train two, with other seeds on other pairs.
"""

import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from ..errors import InputError
from ..lab.checkpoint import read_safetensors, write_safetensors
from ..lab.data import batch_indices, to_float
from ..lab.run import Learner, Run, Training
from ..losses import restored_randomness

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""images (B, 3, H, W) in [-1, 1], their prompts -> (B,), higher is better, with gradient."""


class Scorer(nn.Module):
    """Two towers, trained so that an image's own caption scores highest in its batch (as CLIP,
    arXiv 2103.00020).

    Images are brought to 32x32. Words, and single Chinese and Japanese characters, are hashed into
    4,096 rows, so that any text can be given.
    """

    DIM = 64
    WORDS = 4096
    LENGTH = 32

    def __init__(self, channels: int = 24):
        super().__init__()
        layers = []
        c = 3
        for width in (channels, 2 * channels, 4 * channels):
            layers += [nn.Conv2d(c, width, 4, stride=2, padding=1), nn.GroupNorm(8, width)]
            layers += [nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
            layers += [nn.GroupNorm(8, width), nn.SiLU()]
            c = width
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * c, self.DIM))
        self.words = nn.Embedding(self.WORDS, 64)
        self.places = nn.Parameter(torch.randn(self.LENGTH, 64) * 0.5)
        how = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(64, 4, 128, **how)
        self.text = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.from_text = nn.Linear(64, self.DIM)
        self.from_image = nn.Linear(self.DIM, self.DIM)
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
            words = re.findall(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+", prompt.lower())
            hashed = [1 + zlib.crc32(w.encode()) % (self.WORDS - 1) for w in words[: self.LENGTH]]
            row[: len(hashed)] = torch.tensor(hashed, dtype=torch.long)
        ids = ids.to(device)
        empty = (ids == 0) & (torch.arange(self.LENGTH, device=device) > 0)
        hidden = self.text(self.words(ids) + self.places, src_key_padding_mask=empty)
        kept = (~empty)[..., None]
        return F.normalize(self.from_text((hidden * kept).sum(1) / kept.sum(1)), dim=1)

    def project(self, features: Tensor) -> Tensor:
        """(B, 64) of images -> (B, 64), of length 1, to compare with captions."""
        return F.normalize(self.from_image(F.silu(features)), dim=1)

    def scale(self) -> Tensor:
        return self.temperature.exp().clamp(max=100)

    def logits(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 64) and n prompts -> (B, n)."""
        return self.project(features) @ self.describe(prompts).T * self.scale()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        unit = self.project(self.features(images))
        return (unit * self.describe(prompts)).sum(1) * self.scale()


def train_scorer(images: Tensor, captions: Sequence[str], settings: Training, path: Path) -> Scorer:
    """images: (n, 3, H, W) uint8, with their captions. Cached at `path`."""
    device = images.device
    with restored_randomness(device):
        torch.manual_seed(settings.seed)
        scorer = Scorer().to(device)
    if path.is_file():
        try:
            scorer.load_state_dict(read_safetensors(path)[0])
        except RuntimeError:
            raise InputError(f"{path} is not a scorer of this version: delete it") from None
        return scorer.eval().requires_grad_(False)
    work = path.with_suffix(".partial")
    work.mkdir(parents=True, exist_ok=True)
    learner = Learner(dict(scorer.named_parameters()), settings.clip, weight_decay=0.05)
    run = Run(path.stem, {"scorer": learner}, settings, work, True)
    for step in run:
        rows = batch_indices(len(images), settings.batch, step, settings.seed)
        x = to_float(images[rows.to(device)])
        texts = [captions[i] for i in rows]
        logits = scorer.logits(scorer.features(x), texts)
        which = {caption: i for i, caption in enumerate(texts)}  # the last of equal ones
        own = torch.tensor([which[caption] for caption in texts], device=device)
        per_sample = F.cross_entropy(logits, own, reduction="none")
        places = torch.arange(len(x), device=device)
        per_sample = per_sample + F.cross_entropy(logits.T, places, reduction="none")
        per_sample.mean().backward()
        run.update()
        run.record(per_sample)
        run.note(right=(logits.argmax(1) == own).float().mean())
    write_safetensors(path, scorer.state_dict(), {"kind": "scorer"})
    shutil.rmtree(work)
    return scorer.eval().requires_grad_(False)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIPReward(nn.Module):
    """CLIP's score, 100 times the cosine, through transformers. source: a folder or hub id."""

    def __init__(self, source: str, device: torch.device):
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel

        try:
            model = CLIPModel.from_pretrained(source)
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        except Exception as error:
            raise InputError(
                f"no CLIP model at {source}, a folder or hub id ({str(error).splitlines()[0]})"
            ) from None
        self.model = model.to(device).eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        size = self.model.config.vision_config.image_size
        x = (images.clamp(-1, 1) + 1) / 2
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
        x = normalize(x, CLIP_MEAN, CLIP_STD)
        ids = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        output = self.model(pixel_values=x, **ids.to(x.device))
        return 100 * (output.image_embeds * output.text_embeds).sum(1)
