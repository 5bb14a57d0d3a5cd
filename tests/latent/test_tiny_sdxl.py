import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from pipelines import drawn
from transformers import CLIPTokenizer

import mcm
from mcm.lab.data import to_float
from mcm.lab.run import Training
from mcm.latent import tiny_sdxl
from mcm.latent.sdxl import SDXL, load_pipeline


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    captions, pictures = drawn()
    folder = tmp_path_factory.mktemp("tiny") / "pipe"
    tiny_sdxl.train_tiny_sdxl(
        captions, pictures, folder, Training(60, 16, lr=1e-3), Training(30, 16, lr=1e-3)
    )
    return folder, captions, pictures


@pytest.mark.slow
def test_stock_diffusers_loads_and_samples_it(trained, tmp_path):
    folder, captions, _ = trained
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    run = dict(prompt=captions[0], num_inference_steps=3, guidance_scale=2.0, output_type="pt")
    picture = pipe(**run, generator=torch.manual_seed(0)).images
    assert picture.shape == (1, 3, 32, 32) and picture.isfinite().all()
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**run, generator=torch.manual_seed(0)).images, picture)
    other = pipe(**run | {"prompt": captions[1]}, generator=torch.manual_seed(0)).images
    assert not torch.equal(other, picture)


@pytest.mark.slow
def test_it_is_built_as_sdxl_is(trained):
    pipe = StableDiffusionXLPipeline.from_pretrained(trained[0])
    assert (
        pipe.unet.config.addition_embed_type == "text_time"
        and pipe.config.force_zeros_for_empty_prompt
    )
    alphas = pipe.scheduler.alphas_cumprod
    known = {
        0: 0.999150,
        124: 0.863407,
        249: 0.675432,
        499: 0.277669,
        749: 0.056623,
        999: 0.00466010,
    }
    assert all(abs(alphas[i].item() - v) < 1e-6 for i, v in known.items())
    assert (
        pipe.vae.config.scaling_factor == 1.0 and pipe.scheduler.config.prediction_type == "epsilon"
    )


@pytest.mark.slow
def test_latents_are_whitened(trained):
    """By the convolutions at the autoencoder's waist, so that no scaling factor or mean has to be
    known.
    """
    folder, _, pictures = trained
    latents = SDXL(load_pipeline(str(folder), torch.float32, torch.device("cpu")), 8).to_latents(
        pictures
    )
    assert (
        latents.mean((0, 2, 3)).abs().max() < 1e-3
        and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    )


def test_folding_the_whitening_changes_no_reconstruction(tmp_path):
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    x = to_float(drawn()[1][:8])
    with torch.no_grad():
        before = autoencoder.encode(x).latent_dist
        pictures = autoencoder.decode(before.mode()).sample
        tiny_sdxl.whiten(autoencoder, x)
        after = autoencoder.encode(x).latent_dist
        assert torch.allclose(autoencoder.decode(after.mode()).sample, pictures, atol=1e-4)
        assert torch.allclose(
            after.std / after.mode().std((0, 2, 3), keepdim=True),
            before.std / before.mode().std((0, 2, 3), keepdim=True),
            rtol=1e-3,
        )


@pytest.mark.slow
def test_tokenizers(trained):
    folder, captions, _ = trained
    for name in ("tokenizer", "tokenizer_2"):
        assert (folder / name / "vocab.json").is_file() and (folder / name / "merges.txt").is_file()
        tokenizer = CLIPTokenizer.from_pretrained(folder / name)
        assert tokenizer.eos_token_id != 2  # transformers would pool at the largest id
        ids = tokenizer(captions[0]).input_ids
        assert len(ids) == len(captions[0].split()) + 2  # every word of the world is one token
        assert tokenizer.model_max_length >= max(len(tokenizer(c).input_ids) for c in captions)
        other = tokenizer("Ünïcode, 雪 & unseen words!").input_ids
        assert (
            tokenizer.decode(other, skip_special_tokens=True).replace(" ", "")
            == "ünïcode,雪&unseenwords!"
        )


@pytest.mark.slow
def test_the_pooled_text_changes_with_every_word(trained):
    sdxl = SDXL(load_pipeline(str(trained[0]), torch.float32, torch.device("cpu")), 8)
    words = "a small red circle above a large blue square on black".split()
    other = {
        "a": "on",
        "small": "large",
        "red": "blue",
        "circle": "square",
        "above": "below",
        "large": "small",
        "blue": "green",
        "square": "circle",
        "on": "a",
        "black": "white",
    }
    changed = [" ".join(words[:i] + [other[w]] + words[i + 1 :]) for i, w in enumerate(words)]
    pooled = sdxl.encode([" ".join(words), *changed]).pooled
    assert ((pooled[1:] - pooled[0]).abs().amax(1) > 1e-3).all()


@pytest.mark.slow
def test_a_pipeline_that_is_there_is_not_trained_again(trained, monkeypatch):
    folder, captions, pictures = trained
    monkeypatch.setattr(tiny_sdxl, "train_autoencoder", lambda *a: pytest.fail("trained again"))
    assert isinstance(
        tiny_sdxl.train_tiny_sdxl(captions, pictures, folder, None, None),
        diffusers.StableDiffusionXLPipeline,
    )


@pytest.mark.slow
def test_a_run_cut_short_goes_on(trained, tmp_path, monkeypatch):
    _, captions, pictures = trained
    vae, unet = Training(6, 4, lr=1e-3, save_every=2), Training(6, 4, lr=1e-3, save_every=2)
    whole = tiny_sdxl.train_tiny_sdxl(captions, pictures, tmp_path / "whole", vae, unet)
    original, calls = tiny_sdxl.diffusion_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return original(*args)

    monkeypatch.setattr(tiny_sdxl, "diffusion_loss", interrupted)
    with pytest.raises(RuntimeError, match="power cut"):
        tiny_sdxl.train_tiny_sdxl(captions, pictures, tmp_path / "cut", vae, unet)
    monkeypatch.setattr(tiny_sdxl, "diffusion_loss", original)
    again = tiny_sdxl.train_tiny_sdxl(captions, pictures, tmp_path / "cut", vae, unet)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for a, b in zip(getattr(whole, part).parameters(), getattr(again, part).parameters()):
            assert torch.equal(a, b)


def test_pictures_that_do_not_fit(tmp_path):
    with pytest.raises(mcm.InputError, match="multiple of 8"):
        tiny_sdxl.train_tiny_sdxl(
            ["a"],
            torch.zeros(1, 3, 30, 30, dtype=torch.uint8),
            tmp_path / "x",
            Training(1),
            Training(1),
        )


def test_what_is_in_the_way_of_a_pipeline_stays(tmp_path):
    """A mistyped folder must not cost what is in it."""
    precious = tmp_path / "models" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    for out in (precious.parent, precious):
        with pytest.raises(mcm.InputError, match="is no pipeline: choose a new folder"):
            tiny_sdxl.train_tiny_sdxl(["a"], images, out, Training(1), Training(1))
    assert precious.read_text() == "years of work"


def test_a_run_cut_short_does_not_go_on_with_other_images(tmp_path, monkeypatch):
    def power_cut(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(tiny_sdxl, "train_autoencoder", power_cut)
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    how = (tmp_path / "pipe", Training(1), Training(1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_sdxl.train_tiny_sdxl(["a"], images, *how)
    for captions, pictures in ((["a"], images + 1), (["b"], images)):
        with pytest.raises(mcm.InputError, match="holds a run with images"):
            tiny_sdxl.train_tiny_sdxl(captions, pictures, *how)
