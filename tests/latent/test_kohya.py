"""A student's LoRA in kohya's naming, by the code that the FAQ prints."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from mcm.latent.sdxl import LORA_FILE

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "tutorials" / "weights" / "latent"


@pytest.fixture(scope="module")
def kohya(tmp_path_factory):
    text = (ROOT / "mcm" / "FAQ.md").read_text(encoding="utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "kohya" in c)
    path = tmp_path_factory.mktemp("kohya") / "mlcm-kohya.safetensors"
    code = code.replace("runs/latent/mlcm/", f"{WEIGHTS}/mlcm/").replace(path.name, str(path))
    exec(code, {})
    return path


def test_every_name_is_one_of_the_networks_layers(kohya):
    """lora_unet_ and the layer's name with underscores; three tensors each; the same product."""
    unet = StableDiffusionXLPipeline.from_pretrained(
        WEIGHTS / "pipeline", torch_dtype=torch.float32
    ).unet
    layers = {"lora_unet_" + name.replace(".", "_"): name for name, _ in unet.named_modules()}
    lora, renamed = load_file(WEIGHTS / "mlcm" / LORA_FILE), load_file(kohya)
    assert len(renamed) == len(lora) // 2 * 3
    for key in renamed:
        layer, part = key.split(".", 1)
        assert layer in layers and part in ("lora_down.weight", "lora_up.weight", "alpha")
        if part == "alpha":
            down, up = renamed[f"{layer}.lora_down.weight"], renamed[f"{layer}.lora_up.weight"]
            theirs = renamed[key] / len(down) * up.flatten(1) @ down.flatten(1)
            a, b = (lora[f"unet.{layers[layer]}.lora_{x}.weight"] for x in "AB")
            torch.testing.assert_close(theirs, b.flatten(1) @ a.flatten(1))


def test_a_stock_pipeline_reads_it_back(kohya):
    outputs = []
    for folder, name in ((WEIGHTS / "mlcm", LORA_FILE), (kohya.parent, kohya.name), (None, None)):
        pipe = StableDiffusionXLPipeline.from_pretrained(
            WEIGHTS / "pipeline", torch_dtype=torch.float32
        )
        if folder:
            pipe.load_lora_weights(str(folder), weight_name=name)
        start = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "output_type": "np", "generator": start}
        image = pipe("a small red circle above a large blue square on black", **options).images
        outputs.append(torch.tensor(image))
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().max() > 0.01
