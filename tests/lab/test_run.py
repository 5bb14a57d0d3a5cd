import copy
import json
import resource
import shutil
import signal
import threading
from functools import partial

import pytest
import torch
from loops import train
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

import mcm
import mcm.lab.run
from mcm.lab import options
from mcm.lab.data import batch_indices, digits, to_float
from mcm.lab.run import DenoiserRun, Learner, Training
from mcm.method import multistep

DATA = digits()


def small(dropout=0.2):
    torch.manual_seed(7)
    return mcm.Denoiser(
        mcm.UNet(8, 1, 16, (1, 1), 1, attention=(4,), classes=10, dropout=dropout),
        mcm.CosineSchedule(),
    )


def diffusion(denoiser, x, labels, progress):
    return mcm.diffusion_loss(denoiser, x, labels)


def settings(**changes):
    return Training(
        **dict(iterations=12, batch=32, lr=2e-3, warmup=2, log_every=3, save_every=4) | changes
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 4, 7, 11])
@pytest.mark.parametrize(
    "kind", ["teacher", "student", "bf16", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path, kill_at, kind, monkeypatch
):
    """Weights, averaged weights, optimiser and the position in the annealing of the grid, with
    dropout on.
    """
    seen = []

    def loss(denoiser, x, labels, progress):
        seen.append(progress)
        if len(seen) == kill_at + 1 and not resumed:
            raise Killed
        if kind == "teacher":
            return diffusion(denoiser, x, labels, progress)
        return mcm.consistency_loss(
            denoiser, x, labels, multistep(2, teacher_steps=(4, 64)), progress=progress
        )

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    resumed = True
    if kind == "compiled":  # traced only, to be quick
        traced = partial(torch.nn.Module.compile, backend="eager")
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: traced(self, **how))
    precision = "bf16" if kind == "bf16" else "fp32"
    how = settings(precision=precision, compile=kind == "compiled")
    reference = train(small(), loss, DATA, how, whole, "m")
    seen, resumed = [], False
    with pytest.raises(Killed):
        train(small(), loss, DATA, how, broken, "m")
    seen, resumed = [], True
    result = train(small(), loss, DATA, how, broken, "m", resume=True)
    assert seen[0] == kill_at // 4 * 4 / 12  # from the last checkpoint, not from the start
    for a, b in zip(result.state_dict().values(), reference.state_dict().values()):
        assert torch.equal(a, b)
    first, second = (load_file(d / "m.state.safetensors") for d in (whole, broken))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.slow
def test_training_lowers_the_loss_and_saves_the_averaged_weights(tmp_path):
    run = settings(iterations=150, batch=64, lr=3e-3, ema=0.9, log_every=50, save_every=1000)
    averaged = train(small(0.0), diffusion, DATA, run, tmp_path, "m", note="x")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert len(lines[0]["loss_by_t"]) == 10 and lines[0]["images_per_second"] > 0
    assert (
        abs(sum(lines[0]["loss_by_t"]) / 10 / lines[0]["loss"] - 1) < 0.05
    )  # stratified times fill the bins evenly
    loaded = mcm.load(tmp_path / "m.safetensors")
    assert loaded.metadata["step"] == 150 and loaded.metadata["note"] == "x"
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), averaged.parameters()))


def test_accumulation_is_the_same_gradient(tmp_path):
    """Whole, or in three parts of unequal size: with the noise fixed, the first gradient before
    clipping is the same to rounding.
    """
    noise = torch.randn(len(DATA.images), 1, 8, 8)
    lookup = {to_float(image).numpy().tobytes(): i for i, image in enumerate(DATA.images)}

    def loss(denoiser, x, labels, progress):
        rows = [lookup[image.numpy().tobytes()] for image in x]
        return mcm.diffusion_loss(
            denoiser, x, labels, t=torch.tensor(rows).double() / 3000 + 0.4, noise=noise[rows]
        )

    norms = []
    for parts in (1, 3):
        (tmp_path / str(parts)).mkdir()
        denoiser = small(0.0)
        for p in denoiser.parameters():  # the zero-initialised layers would hide the rest
            p.data += 0.05 * torch.randn(
                p.shape, generator=torch.Generator().manual_seed(p.numel())
            )
        train(
            denoiser,
            loss,
            DATA,
            settings(accumulate=parts, iterations=1),
            tmp_path / str(parts),
            "m",
        )
        norms.append(json.loads((tmp_path / str(parts) / "log.jsonl").read_text())["gradient_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0.1


def test_augmentation_mirrors_half_of_the_images(tmp_path):
    seen, known = [], {image.numpy().tobytes() for image in to_float(DATA.images)}

    def loss(denoiser, x, labels, progress):
        seen.extend(
            (
                image.numpy().tobytes() in known,
                image.flip(-1).contiguous().numpy().tobytes() in known,
            )
            for image in x
        )
        return diffusion(denoiser, x, labels, progress)

    for augment in (False, True):
        seen.clear()
        train(small(), loss, DATA, settings(augment=augment), tmp_path, "m")
        assert all(a or b for a, b in seen)
        share = sum(a for a, _ in seen) / len(seen)  # of images as they are in the data
        assert share == 1 if not augment else 0.4 < share < 0.6


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_next_steps_do_not_wait_for_the_disk(tmp_path, monkeypatch):
    """The state after step 4, and then the averaged weights, are on their way to a slow disk while
    step 5 runs; what arrives is of step 4.
    """
    whole, slow = tmp_path / "whole", tmp_path / "slow"
    whole.mkdir(), slow.mkdir()
    averages = []
    train(
        small(),
        diffusion,
        DATA,
        settings(iterations=12, save_every=4),
        whole,
        "m",
        preview=lambda model, _: averages.append(flat(model)),
    )
    written, models, real = [], [], mcm.lab.run.write_safetensors

    def slowly(path, *rest):
        if path.name == "m.state.safetensors":
            assert len(seen) == 12 or passed.wait(60)
            written.append(rest[1]["step"])
        real(path, *rest)

    def save(path, denoiser, **metadata):
        models.append((metadata["step"], flat(denoiser)))
        assert written[-1] == metadata["step"]  # the state comes first
        mcm.save(path, denoiser, **metadata)

    seen, passed = [], threading.Event()

    def loss(denoiser, x, labels, progress):
        seen.append(progress)
        if len(seen) == 6:
            assert written == []
            passed.set()
        return diffusion(denoiser, x, labels, progress)

    monkeypatch.setattr(mcm.lab.run, "write_safetensors", slowly)
    monkeypatch.setattr(mcm.lab.run, "save", save)
    train(small(), loss, DATA, settings(iterations=12, save_every=4), slow, "m")
    assert written == [step for step, _ in models] == [4, 8, 12]
    assert all(torch.equal(a, b) for (_, a), b in zip(models, averages, strict=True))
    for name in ("m.state.safetensors", "m.state.previous.safetensors"):
        first, second = (load_file(folder / name) for folder in (whole, slow))
        assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_steps_are_the_same_steps(tmp_path):
    """To rounding; and what is saved loads as ever."""
    plain, compiled = (
        train(small(0.0), diffusion, DATA, settings(iterations=4, compile=c), tmp_path, f"m{c}")
        for c in (False, True)
    )
    for a, b in zip(plain.parameters(), compiled.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert mcm.load(tmp_path / "mTrue.safetensors").metadata["step"] == 4


@pytest.mark.slow
def test_compiling_without_a_compiler_is_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))

    def main(argv):
        how = settings(iterations=1, compile=True, batch=8)
        train(small(0.0), diffusion, DATA, how, tmp_path, "m")

    assert options.run("run_cifar.py", main, []) == 2
    assert "no C++ compiler" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_graph_is_compiled_once(tmp_path, precision, monkeypatch):
    """A teacher and students of 1, 2, 4 and 8 steps distilled from it in one process, all compiled:
    a graph for training, one for the student's answer without gradient, one for the frozen
    teacher's. Networks of equal shape share them. (Traced only, to be quick.)
    """
    traced = partial(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: traced(self, **how))
    torch._dynamo.reset()
    counters.clear()
    how = settings(iterations=1, compile=True, batch=8, precision=precision)
    teacher = train(small(0.0), diffusion, DATA, how, tmp_path, "teacher")
    for K in (1, 2, 4, 8):
        student = small(0.0)
        student.student_steps = K
        run = DenoiserRun(f"cd-{K}", student, how, tmp_path)
        frozen = run.frozen(teacher)
        for _ in run:
            for x, labels, t, noise in run.parts(DATA):
                asked = {"teacher": frozen, "t": t, "noise": noise}
                run.backward(mcm.consistency_loss(run.model, x, labels, multistep(K), **asked))
            run.update()
        assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"] and not counters["unimplemented"]


def test_average_is_the_recursion(tmp_path):
    """One step: averaged = w_0 + (1 - 1/10)(w_1 - w_0): the decay starts at (1 + 0) / (10 + 0)."""
    denoiser = small(0.0)
    start = copy.deepcopy(denoiser)
    averaged = train(denoiser, diffusion, DATA, settings(iterations=1), tmp_path, "m")
    for w0, w1, a in zip(start.parameters(), denoiser.parameters(), averaged.parameters()):
        torch.testing.assert_close(a, w0 + 0.9 * (w1 - w0), rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_is_skipped_counted_and_reported(tmp_path, capsys):
    """Steps 2 and 6 of 12 change neither weights nor optimiser: what remains equals a run that
    never made them.
    """

    def loss(denoiser, x, labels, progress):
        out = diffusion(denoiser, x, labels, progress)
        return out._replace(loss=out.loss * float("nan")) if round(progress * 12) in (1, 5) else out

    class Reference(mcm.lab.run.Learner):
        def update(self):
            if self.step not in (1, 5):
                return super().update()
            self.optimizer.zero_grad()
            self.norm = torch.tensor(0.0)

    (tmp_path / "skipped").mkdir()
    skipped = train(small(), loss, DATA, settings(ema=0.0), tmp_path / "skipped", "m")
    mcm.lab.run.Learner, kept = Reference, mcm.lab.run.Learner
    try:
        reference = train(small(), diffusion, DATA, settings(ema=0.0), tmp_path, "m")
    finally:
        mcm.lab.run.Learner = kept
    assert all(
        torch.equal(a, b) and a.isfinite().all()
        for a, b in zip(skipped.parameters(), reference.parameters())
    )
    lines = [
        json.loads(line) for line in (tmp_path / "skipped" / "log.jsonl").read_text().splitlines()
    ]
    assert sum(line["skipped"] for line in lines) == 2 and all(line["loss"] > 0 for line in lines)
    assert "1 of the 3 steps up to 3 were skipped" in "".join(capsys.readouterr())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_too_many_in_a_row_stop_the_run_and_keep_the_last_checkpoint(tmp_path, what):
    def loss(denoiser, x, labels, progress):
        out = diffusion(denoiser, x, labels, progress)
        if progress < 9 / 40:
            return out
        if what == "loss":
            return out._replace(
                loss=out.loss * float("nan"), per_sample=out.per_sample * float("nan")
            )
        return out._replace(
            loss=out.loss + sum((p - p).sum().sqrt() for p in denoiser.parameters())
        )  # 0, with derivative 1 / 0

    with pytest.raises(mcm.InputError, match="no longer finite, from step 10 on"):
        train(small(), loss, DATA, settings(iterations=40, save_every=12), tmp_path, "m")
    kept = mcm.load(tmp_path / "m.safetensors")
    assert kept.metadata["step"] == 12 and all(p.isfinite().all() for p in kept.parameters())
    # ... and a run whose loss behaves again goes on from there
    assert (
        train(
            small(),
            diffusion,
            DATA,
            settings(iterations=40, save_every=12),
            tmp_path,
            "m",
            resume=True,
        ).metadata["step"]
        == 40
    )


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage):
    (tmp_path / "whole").mkdir()
    reference = train(small(), diffusion, DATA, settings(), tmp_path / "whole", "m")
    train(small(), diffusion, DATA, settings(), tmp_path, "m")
    state = tmp_path / "m.state.safetensors"
    if damage == "missing":  # as a kill between the two renamings of a save leaves it
        state.rename(tmp_path / "m.state.safetensors.partial")
    else:
        state.write_bytes(state.read_bytes()[:10_000] if damage == "truncated" else b"x" * 10_000)
    seen = []

    def loss(denoiser, x, labels, progress):
        seen.append(progress)
        return diffusion(denoiser, x, labels, progress)

    resumed = train(small(), loss, DATA, settings(), tmp_path, "m", resume=True)
    assert len(seen) == 4 and all(
        torch.equal(a, b) for a, b in zip(resumed.parameters(), reference.parameters())
    )
    said = capsys.readouterr().err
    assert (
        damage == "missing"
        or "m.state.safetensors: not a readable checkpoint" in said
        and "Continuing from the checkpoint before it, step 8" in said
    )
    previous = tmp_path / "m.state.previous.safetensors"
    assert previous.is_file()
    state.unlink()  # as one does to begin anew
    assert mcm.lab.run.load_state(state, {}, settings()) is None
    for file in (state, previous):
        file.write_bytes(b"x")
    with pytest.raises(mcm.InputError, match="not a readable checkpoint"):
        train(small(), diffusion, DATA, settings(), tmp_path, "m", resume=True)


def test_a_full_disk_is_explained_and_nothing_saved_is_lost(tmp_path):
    """For real: the process may write no file larger than 100 kB, which the averaged weights fit
    into and the state does not.
    """
    (tmp_path / "whole").mkdir()
    reference = train(small(0.0), diffusion, DATA, settings(iterations=8), tmp_path / "whole", "m")

    def at_step_six(denoiser, x, labels, progress):
        if progress == 5 / 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        return diffusion(denoiser, x, labels, progress)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            mcm.InputError,
            match=(
                r"m(.state)?.safetensors could not be written .*make room, and continue with "
                r"--resume"
            ),
        ):
            train(small(0.0), at_step_six, DATA, settings(iterations=8), tmp_path, "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert mcm.load(tmp_path / "m.safetensors").metadata["step"] == 4 and not list(
        tmp_path.glob("*.partial")
    )
    resumed = train(small(0.0), diffusion, DATA, settings(iterations=8), tmp_path, "m", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), reference.parameters()))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(iterations=24), "iterations 12"),
        (dict(batch=16), "batch 32"),
        (dict(seed=5), "seed 0"),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path, change, message):
    train(small(), diffusion, DATA, settings(), tmp_path, "m")
    with pytest.raises(mcm.InputError, match=message):
        train(small(), diffusion, DATA, settings(**change), tmp_path, "m", resume=True)


def test_resuming_another_network_is_refused(tmp_path):
    train(small(), diffusion, DATA, settings(), tmp_path, "m")
    wider = mcm.Denoiser(
        mcm.UNet(8, 1, 24, (1, 1), 1, attention=(4,), classes=10), mcm.CosineSchedule()
    )
    with pytest.raises(mcm.InputError, match="another shape"):
        train(wider, diffusion, DATA, settings(), tmp_path, "m", resume=True)


def test_batches_are_shuffled_passes_over_the_data():
    drawn = torch.cat([batch_indices(50, 8, step, seed=1) for step in range(25)])  # 200 = 4 passes
    for epoch in drawn.split(50):
        assert torch.equal(epoch.sort().values, torch.arange(50))
    assert not torch.equal(drawn[:50], drawn[50:100])
    assert not torch.equal(
        drawn[:50], torch.cat([batch_indices(50, 8, s, seed=2) for s in range(7)])[:50]
    )
    assert torch.equal(
        batch_indices(3, 8, 0, 0).bincount(minlength=3).clamp_max(2), torch.tensor([2, 2, 2])
    )  # a batch larger than the data


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_bf16_trains_every_weight(tmp_path, kind):
    """Through the copies that the network computes with, which follow."""

    def loss(denoiser, x, labels, progress):
        if kind == "teacher":
            return diffusion(denoiser, x, labels, progress)
        return mcm.consistency_loss(
            denoiser, x, labels, multistep(2, teacher_steps=(4, 64)), progress=progress
        )

    averaged = train(small(), loss, DATA, settings(precision="bf16"), tmp_path, "m")
    for (name, before), after in zip(small().named_parameters(), averaged.parameters()):
        assert (
            after.dtype == torch.float32
            and after.isfinite().all()
            and not torch.equal(before, after)
        ), name


def test_bf16_has_float32s_gradients_to_its_rounding(tmp_path):
    """Of a batch in one part and in two, whose gradients are added in float32."""
    gradients = []
    for precision, parts in (("fp32", 1), ("bf16", 1), ("bf16", 2)):
        denoiser = small(0.0)
        torch.manual_seed(1)
        for p in denoiser.parameters():  # zero-initialised layers would stop every gradient
            torch.nn.init.normal_(p, std=0.1) if p.ndim == 1 else torch.nn.init.xavier_normal_(p)
        how = settings(iterations=1, precision=precision)
        run = DenoiserRun("m", denoiser, how, tmp_path)
        for _ in run:
            for x, labels, t, noise in run.parts(DATA):
                whole = (x, labels, t, noise)
                run._share = 1 / parts
                for rows in torch.arange(len(x)).chunk(parts):
                    x, labels, t, noise = (a[rows] for a in whole)
                    run.backward(mcm.diffusion_loss(run.model, x, labels, t=t, noise=noise))
            gradients.append(torch.cat([p.grad.flatten() for p in denoiser.parameters()]))
            run.update()
    exact, *others = gradients
    for other in others:
        assert other.dtype == torch.float32
        assert 1e-4 < (other - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_resume(tmp_path, which):
    """The signal comes in the middle of step 6, between two checkpoints; the step is finished and
    saved.
    """
    calls = []

    def loss(denoiser, x, labels, progress):
        calls.append(progress)
        if len(calls) == 6 and first:
            signal.raise_signal(which)
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
    assert len(calls) == 6 and all(
        torch.equal(a, b) for a, b in zip(resumed.parameters(), reference.parameters())
    )
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()][
        -1
    ] == 12


def test_a_signal_while_the_end_is_being_saved_is_not_lost(tmp_path, monkeypatch):
    save_model = DenoiserRun.save_model

    def interrupted(run):
        save_model(run)
        if run.step == 11:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(DenoiserRun, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(small(), diffusion, DATA, settings(), tmp_path, "m")
    assert mcm.load(tmp_path / "m.safetensors").metadata["step"] == 12


def test_a_state_of_other_shapes_or_steps_is_refused(tmp_path):
    """Shapes that would fit by repetition, and numbers that no run of ours would have written."""
    train(small(), diffusion, DATA, settings(), tmp_path, "m")
    path = tmp_path / "m.state.safetensors"
    tensors, metadata = mcm.lab.checkpoint.read_safetensors(path)
    for tampered, changes, message in (
        (tensors | {"model/raw.network.first.bias": torch.zeros(1)}, {}, "another shape"),
        (tensors | {"model/adam.x.step": torch.zeros(())}, {}, "another shape"),
        (tensors | {"model/adam.0.exp_avg": torch.zeros(1)}, {}, "another shape"),
        (tensors, {"step": "12"}, "step 12, .* in a run of 12"),
        (tensors, {"step": 13}, "step 13, .* in a run of 12"),
        (tensors, {"elapsed": None}, "seconds None"),
    ):
        mcm.lab.checkpoint.write_safetensors(path, tampered, metadata | changes)
        with pytest.raises(mcm.InputError, match=message):
            train(small(), diffusion, DATA, settings(), tmp_path, "m", resume=True)


def test_the_parts_of_a_batch_may_change(tmp_path):
    """As a run that met a lack of memory needs."""
    train(small(), diffusion, DATA, settings(iterations=12, save_every=4), tmp_path, "m")
    state = tmp_path / "m.state.safetensors"
    (tmp_path / "m.state.previous.safetensors").rename(state)
    averaged = train(
        small(),
        diffusion,
        DATA,
        settings(iterations=12, save_every=4, accumulate=2),
        tmp_path,
        "m",
        resume=True,
    )
    assert (
        averaged.metadata["step"] == 12
        and json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 12
    )


def test_the_log_has_each_step_once(tmp_path):
    """A kill between two checkpoints leaves lines that the resumed run writes again, and perhaps
    half a line.
    """
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
    train(
        small(),
        diffusion,
        DATA,
        settings(),
        tmp_path,
        "m",
        preview=lambda model, step: seen.append((step, model.training)),
    )
    assert seen == [(4, False), (8, False), (12, False)]


def test_the_learning_rate_rises_and_falls_along_a_cosine():
    settings = Training(1000, lr=0.2, warmup=100)
    assert settings.lr_at(0) == pytest.approx(0.2 / 100)
    assert settings.lr_at(99) == pytest.approx(0.2 * 0.976, rel=1e-3)
    assert settings.lr_at(500) == pytest.approx(0.1)
    assert settings.lr_at(750) == pytest.approx(0.2 * (0.5 - 0.5**1.5), rel=1e-6)
    assert settings.lr_at(999) < 1e-6


def test_a_gradient_beyond_the_clip_is_shortened():
    """Seen in Adam's first moment, which is a tenth of what it was given."""
    for size, kept in ((100.0, 2.0), (1.5, 1.5)):
        weight = nn.Parameter(torch.zeros(4))
        learner = Learner({"w": weight}, clip=2.0)
        weight.grad = torch.full((4,), size / 2)  # of this norm
        learner.update()
        first = learner.optimizer.state_dict()["state"][0]["exp_avg"]
        assert learner.norm == pytest.approx(size)
        assert first.norm().item() == pytest.approx(0.1 * kept, rel=1e-4)
