import copy
import json
import signal

import pytest
import torch
from safetensors.torch import load_file

import mcm
from mcm.data import digits, to_float
from mcm.recipes import mcm as recipe
from mcm.training import Training, batch_indices, train

DATA = digits()


def small(dropout=0.2):
    torch.manual_seed(7)
    return mcm.Denoiser(mcm.UNet(8, 1, 16, (1, 1), 1, attention=(4,), classes=10, dropout=dropout), mcm.CosineSchedule())


def diffusion(denoiser, x, labels, progress):
    return mcm.diffusion_loss(denoiser, x, labels)


def settings(**changes):
    return Training(**dict(iterations=12, batch=32, lr=2e-3, warmup=2, log_every=3, save_every=4) | changes)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 4, 7, 11])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, kill_at, kind):
    """Weights, averaged weights, optimiser and the position in the annealing of the grid, with dropout on."""
    seen = []

    def loss(denoiser, x, labels, progress):
        seen.append(progress)
        if len(seen) == kill_at + 1 and not resumed:
            raise Killed
        if kind == "teacher":
            return diffusion(denoiser, x, labels, progress)
        return mcm.consistency_loss(denoiser, x, labels, recipe(2, teacher_steps=(4, 64)), progress=progress)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    resumed = True
    reference = train(small(), loss, DATA, settings(), whole, "m")
    seen, resumed = [], False
    with pytest.raises(Killed):
        train(small(), loss, DATA, settings(), broken, "m")
    seen, resumed = [], True
    result = train(small(), loss, DATA, settings(), broken, "m", resume=True)
    assert seen[0] == kill_at // 4 * 4 / 12  # from the last checkpoint, not from the start
    for a, b in zip(result.state_dict().values(), reference.state_dict().values()):
        assert torch.equal(a, b)
    first, second = (load_file(d / "m.state.safetensors") for d in (whole, broken))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_training_lowers_the_loss_and_saves_the_averaged_weights(tmp_path):
    run = settings(iterations=150, batch=64, lr=3e-3, ema=0.9, log_every=50, save_every=1000)
    averaged = train(small(0.0), diffusion, DATA, run, tmp_path, "m", note="x")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert len(lines[0]["loss_by_t"]) == 10 and lines[0]["images_per_second"] > 0
    assert abs(sum(lines[0]["loss_by_t"]) / 10 / lines[0]["loss"] - 1) < 0.05  # stratified times fill the bins evenly
    loaded = mcm.load(tmp_path / "m.safetensors")
    assert loaded.metadata["step"] == 150 and loaded.metadata["note"] == "x"
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), averaged.parameters()))


def test_accumulation_is_the_same_gradient(tmp_path):
    """Whole, or in three parts of unequal size: with the noise fixed, the first gradient before clipping is the same to rounding."""
    noise = torch.randn(len(DATA.images), 1, 8, 8)
    lookup = {to_float(image).numpy().tobytes(): i for i, image in enumerate(DATA.images)}

    def loss(denoiser, x, labels, progress):
        rows = [lookup[image.numpy().tobytes()] for image in x]
        return mcm.diffusion_loss(denoiser, x, labels, t=torch.tensor(rows).double() / 3000 + 0.4, noise=noise[rows])

    norms = []
    for parts in (1, 3):
        (tmp_path / str(parts)).mkdir()
        denoiser = small(0.0)
        for p in denoiser.parameters():  # the zero-initialised layers would hide the rest
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        train(denoiser, loss, DATA, settings(accumulate=parts, iterations=1), tmp_path / str(parts), "m")
        norms.append(json.loads((tmp_path / str(parts) / "log.jsonl").read_text())["gradient_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0.1


def test_average_is_the_recursion(tmp_path):
    """One step: averaged = w_0 + (1 - 1/10)(w_1 - w_0), as the decay starts at (1 + 0) / (10 + 0)."""
    denoiser = small(0.0)
    start = copy.deepcopy(denoiser)
    averaged = train(denoiser, diffusion, DATA, settings(iterations=1), tmp_path, "m")
    for w0, w1, a in zip(start.parameters(), denoiser.parameters(), averaged.parameters()):
        torch.testing.assert_close(a, w0 + 0.9 * (w1 - w0), rtol=1e-5, atol=1e-7)


def test_a_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    def loss(denoiser, x, labels, progress):
        out = diffusion(denoiser, x, labels, progress)
        return out._replace(loss=out.loss * float("nan"), per_sample=out.per_sample * float("nan")) if progress >= 9 / 12 else out

    with pytest.raises(mcm.InputError, match="no longer finite at step 10"):
        train(small(), loss, DATA, settings(), tmp_path, "m")
    kept = mcm.load(tmp_path / "m.safetensors")
    assert kept.metadata["step"] == 8 and all(p.isfinite().all() for p in kept.parameters())
    # ... and a run whose loss behaves again goes on from there
    assert train(small(), diffusion, DATA, settings(), tmp_path, "m", resume=True).metadata["step"] == 12


def test_a_gradient_that_is_not_finite_is_caught_too(tmp_path):
    def loss(denoiser, x, labels, progress):
        out = diffusion(denoiser, x, labels, progress)
        bad = sum((p - p).sum().sqrt() for p in denoiser.parameters())  # 0, with derivative 1 / 0
        return out._replace(loss=out.loss + bad) if progress >= 5 / 12 else out

    with pytest.raises(mcm.InputError, match="no longer finite at step 6"):
        train(small(), loss, DATA, settings(), tmp_path, "m")
    assert mcm.load(tmp_path / "m.safetensors").metadata["step"] == 4


@pytest.mark.parametrize("change, message", [(dict(iterations=24), "iterations 12"), (dict(batch=16), "batch 32"), (dict(seed=5), "seed 0")])
def test_resuming_with_other_settings_is_refused(tmp_path, change, message):
    train(small(), diffusion, DATA, settings(), tmp_path, "m")
    with pytest.raises(mcm.InputError, match=message):
        train(small(), diffusion, DATA, settings(**change), tmp_path, "m", resume=True)


def test_resuming_another_network_is_refused(tmp_path):
    train(small(), diffusion, DATA, settings(), tmp_path, "m")
    wider = mcm.Denoiser(mcm.UNet(8, 1, 24, (1, 1), 1, attention=(4,), classes=10), mcm.CosineSchedule())
    with pytest.raises(mcm.InputError, match="another shape"):
        train(wider, diffusion, DATA, settings(), tmp_path, "m", resume=True)


def test_batches_are_shuffled_passes_over_the_data():
    drawn = torch.cat([batch_indices(50, 8, step, seed=1) for step in range(25)])  # 200 = 4 passes
    for epoch in drawn.split(50):
        assert torch.equal(epoch.sort().values, torch.arange(50))
    assert not torch.equal(drawn[:50], drawn[50:100])
    assert not torch.equal(drawn[:50], torch.cat([batch_indices(50, 8, s, seed=2) for s in range(7)])[:50])
    assert torch.equal(batch_indices(3, 8, 0, 0).bincount(minlength=3).clamp_max(2), torch.tensor([2, 2, 2]))  # a batch larger than the data


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_bf16_trains_every_weight(tmp_path, kind):
    """Autocast's cache of cast weights must not carry the target call's missing gradient over to the student's call."""

    def loss(denoiser, x, labels, progress):
        if kind == "teacher":
            return diffusion(denoiser, x, labels, progress)
        return mcm.consistency_loss(denoiser, x, labels, recipe(2, teacher_steps=(4, 64)), progress=progress)

    averaged = train(small(), loss, DATA, settings(precision="bf16"), tmp_path, "m")
    for (name, before), after in zip(small().named_parameters(), averaged.parameters()):
        assert after.dtype == torch.float32 and after.isfinite().all() and not torch.equal(before, after), name


def test_ctrl_c_saves_and_resumes(tmp_path):
    """The signal comes in the middle of step 6, between two checkpoints; the step is finished and saved."""
    calls = []

    def loss(denoiser, x, labels, progress):
        calls.append(progress)
        if len(calls) == 6 and first:
            signal.raise_signal(signal.SIGINT)
        return diffusion(denoiser, x, labels, progress)

    (tmp_path / "whole").mkdir()
    first = False
    reference = train(small(), loss, DATA, settings(), tmp_path / "whole", "m")
    calls, first = [], True
    with pytest.raises(KeyboardInterrupt):
        train(small(), loss, DATA, settings(), tmp_path, "m")
    assert mcm.load(tmp_path / "m.safetensors").metadata["step"] == 6
    calls, first = [], False
    resumed = train(small(), loss, DATA, settings(), tmp_path, "m", resume=True)
    assert len(calls) == 6 and all(torch.equal(a, b) for a, b in zip(resumed.parameters(), reference.parameters()))
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1] == 12


def test_the_log_has_each_step_once(tmp_path):
    """A kill between two checkpoints leaves lines that the resumed run writes again, and perhaps half a line."""
    train(small(), diffusion, DATA, settings(), tmp_path, "m")
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(whole)
    (tmp_path / "log.jsonl").write_text(whole + '{"model": "m", "st')
    train(small(), diffusion, DATA, settings(), tmp_path, "m", resume=True)
    assert (tmp_path / "log.jsonl").read_text() == whole
    train(small(), diffusion, DATA, settings(), tmp_path, "m")  # from the start again
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 12


def test_previews_are_drawn_at_every_checkpoint(tmp_path):
    seen = []
    train(small(), diffusion, DATA, settings(), tmp_path, "m", preview=lambda model, step: seen.append((step, model.training)))
    assert seen == [(4, False), (8, False), (12, False)]
