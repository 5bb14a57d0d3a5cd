import pytest
import torch
from pipelines import drawn, untrained_pipeline
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import mcm
from mcm.lab import metrics
from mcm.lab.data import to_float
from mcm.lab.run import Training
from mcm.latent.scorer import CLIPReward, Scorer, train_scorer


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    captions, pictures = drawn()
    return train_scorer(
        pictures,
        captions,
        Training(80, 64, lr=2e-3),
        tmp_path_factory.mktemp("scorer") / "s.safetensors",
    )


@pytest.mark.slow
def test_it_learns_which_caption_belongs_to_a_picture(scorer):
    captions, pictures = drawn()
    x = to_float(pictures[:64])
    right = scorer(x, captions[:64])
    assert (right > scorer(x, captions[1:65])).double().mean() > 0.85
    assert torch.allclose(
        right, scorer.logits(scorer.features(x), captions[:64]).diagonal(), atol=1e-4
    )


@pytest.mark.slow
def test_it_is_differentiable_in_the_picture_and_takes_any_size_and_script(scorer):
    x = torch.randn(3, 3, 48, 48, requires_grad=True)
    scorer(x, ["大红圆", "", "a red circle " * 30]).sum().backward()
    assert x.grad.abs().max() > 0
    described = Scorer().describe(["红圆", "圆红", "a b", "b a"])
    assert not torch.allclose(described[0], described[1]) and not torch.allclose(
        described[2], described[3]
    )


def test_a_trained_scorer_is_kept_and_a_run_cut_short_goes_on(tmp_path, monkeypatch):
    captions, pictures = drawn()
    settings = Training(6, 16, lr=1e-3, save_every=2)
    whole = train_scorer(pictures, captions, settings, tmp_path / "whole.safetensors")
    again = train_scorer(pictures, captions, settings, tmp_path / "whole.safetensors")
    forward, calls = Scorer.features, []

    def interrupted(self, images):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return forward(self, images)

    monkeypatch.setattr(Scorer, "features", interrupted)
    with pytest.raises(RuntimeError):
        train_scorer(pictures, captions, settings, tmp_path / "cut.safetensors")
    monkeypatch.setattr(Scorer, "features", forward)
    cut = train_scorer(pictures, captions, settings, tmp_path / "cut.safetensors")
    for a, b, c in zip(whole.parameters(), again.parameters(), cut.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.safetensors", "cut.safetensors"}


def test_clip_through_transformers(tmp_path):
    """With a model of tiny size and no training: 100 times the cosine of the two embeddings."""
    pipe = untrained_pipeline(tmp_path / "words")
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=16,
    )
    text = CLIPTextConfig(
        vocab_size=len(pipe.tokenizer),
        max_position_embeddings=77,
        eos_token_id=pipe.tokenizer.eos_token_id,
        **sizes,
    )
    model = CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **sizes).to_dict(),
            projection_dim=16,
        )
    )
    model.save_pretrained(tmp_path / "clip")
    pipe.tokenizer.save_pretrained(tmp_path / "clip")
    reward = CLIPReward(str(tmp_path / "clip"), torch.device("cpu"))
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    value = reward(x, ["a small red circle", "a blue square"])
    value.sum().backward()
    assert value.shape == (2,) and value.abs().max() <= 100 and x.grad.abs().max() > 0
    with pytest.raises(mcm.InputError, match="no CLIP model at"):
        CLIPReward(str(tmp_path / "nowhere"), torch.device("cpu"))


def test_coverage():
    real = torch.randn(400, 8)
    assert metrics.coverage(real, torch.randn(400, 8)) > 0.9
    assert metrics.coverage(real, real[:20].repeat(20, 1)) < 0.4  # 20 pictures over and over
    assert metrics.coverage(real, real + 100) == 0


def test_principal_components_see_what_is_blurred():
    torch.manual_seed(0)
    basis = torch.randn(20, 4 * 64)
    latents = (torch.randn(2000, 20) @ basis).reshape(-1, 4, 8, 8)
    features = metrics.principal_components(latents, 16)
    real = features(latents)
    assert (
        torch.allclose(real.std(0), torch.ones(16, dtype=torch.float64), atol=0.01)
        and real.mean(0).abs().max() < 1e-6
    )
    other = features((torch.randn(2000, 20) @ basis).reshape(-1, 4, 8, 8))
    blurred = features(0.7 * latents)
    assert metrics.frechet(real, other) < 0.1 < 1 < metrics.frechet(real, blurred)
    assert features(torch.randn(3, 4, 8, 8)).shape == (3, 16)
    assert metrics.principal_components(torch.randn(40, 4, 16, 16))(
        torch.randn(2, 4, 16, 16)
    ).shape == (2, 16)
