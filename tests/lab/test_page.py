"""The page of a run: what is in it. What it does in a browser: tests/test_explorer.py."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import mcm
from mcm.lab import explorer


def data_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r"const DATA = (.*);\n", text)[1].replace("<\\/", "</"))


def decoded(url):
    picture = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    return torch.from_numpy(np.array(picture.convert("RGB"))).long()


def views(size=8, channels=1, n=3, steps=(1, 64)):
    row = {"nfe": 2, "sampler": "ddim", "frechet": 1.5, "seconds_per_image": 0.001}
    found = []
    for K in steps:
        path = torch.randn(min(K, 8), 2, n, channels, size, size)
        images = torch.rand(n, channels, size, size) * 2 - 1
        times = [1 - i / 8 for i in range(len(path))]
        name = "teacher" if K == 64 else "student"
        found.append(explorer.View(name, K, images, row, times, path, images.flip(0)))
    return found


@pytest.mark.parametrize("solver", [mcm.ddim, mcm.renoise])
def test_a_watched_walk_is_the_sampler_s(solver):
    """And what it shows leads there: the last x_hat of a DDIM walk is the image."""
    torch.manual_seed(0)
    model = mcm.Denoiser(mcm.UNet(8, 1, 16, (1,), 1, classes=3), mcm.CosineSchedule())
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z, labels = torch.randn(3, 1, 8, 8), torch.arange(3)
    how = {"solver": solver, "steps": 20}
    images, times, path = explorer.walk(
        model, z, labels, generator=torch.Generator().manual_seed(1), **how
    )
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(images, mcm.sample(model, z, cond=labels, generator=generator, **how))
    assert path.shape == (8, 2, 3, 1, 8, 8) and len(times) == 8
    assert torch.equal(path[0, 0], z) and times[0] == 1 and times == sorted(times, reverse=True)
    t = torch.full((3,), times[5], dtype=torch.float64)
    torch.testing.assert_close(path[5, 1], model(path[5, 0], t, labels))
    few = explorer.walk(model, z, labels, steps=2)
    assert torch.equal(few[2][1, 1], few[0]) and few[1] == [1.0, 0.5]


def test_a_page_holds_the_pictures_dot_for_dot(tmp_path):
    found = views()
    title = 'a <b>folder</b> & "more"</script>'
    explorer.save_page(tmp_path / "p.html", found, ["0", "1", "</script>"], "class", title, "n")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 1 and "<b>folder" not in text.split("<script>")[0]
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)|@import|fetch\(", text)
    assert "SHARED_" not in text and "DATA_" not in text
    data = data_of(tmp_path / "p.html")
    assert data["title"] == title and data["labels"][2] == "</script>"
    for view, told in zip(found, data["views"]):
        dots = decoded(told["images"])
        assert dots.shape == (8, 24, 3)
        wanted = ((view.images[1, 0] + 1) * 127.5).round().long()
        assert torch.equal(dots[:, 8:16, 0], wanted) and torch.equal(dots[..., 0], dots[..., 2])
        wanted = ((view.path[0, 0, 2, 0].clamp(-2, 2) / 2 + 1) * 127.5).round().long()
        assert torch.equal(decoded(told["path"])[:8, 16:, 0], wanted)
        assert told["ms"] == 1 and told["sampler"] == "DDIM" and told["figure"] == 1.5


@pytest.mark.parametrize("size", [32, 64, 512])
def test_a_page_stays_light_whatever_the_images(size, tmp_path):
    """Noise is the hardest to compress. 1,024 pixels are shown as 512 are."""
    n = explorer.how_many(size) if size < 512 else 4
    found = views(size, 3, n, (1, 2, 4, 8, 16, 32, 64))
    explorer.save_page(tmp_path / "p.html", found, ["x"] * n, "caption", "t", "n")
    assert (tmp_path / "p.html").stat().st_size < 5e6
    assert data_of(tmp_path / "p.html")["smooth"] == (size > 64)
