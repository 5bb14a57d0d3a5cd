"""What only a CUDA GPU can show; skipped elsewhere."""

import functools

import pytest
import torch
from loops import train

import mcm
from mcm import multistep
from mcm.lab.data import load_data
from mcm.lab.run import DenoiserRun, Training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = torch.device("cuda")
STEPS = 8


def filled(seed):
    """A denoiser whose zero-initialised layers are filled in: they would stop every gradient."""
    torch.manual_seed(seed)
    denoiser = mcm.Denoiser(mcm.UNet(8, 1, 32, (1, 1), 1, (4,), 10), mcm.CosineSchedule())
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim == 1 else torch.nn.init.xavier_normal_(p)
    return denoiser


@pytest.mark.parametrize("kind", ["teacher", "ct", "cd"])
def test_a_training_step_never_waits_for_the_gpu(kind, tmp_path):
    """Choosing the batch, the loss, its gradient and the update, between the second step and the
    last but one: PyTorch raises at the synchronisations it knows of.
    """
    data, calls = load_data("digits").to(DEVICE), []
    student, teacher = (
        mcm.Denoiser(mcm.UNet(8, 1, 32, (1, 1), 1, (4,), 10, dropout), mcm.CosineSchedule()).cuda()
        for dropout in (0.1, 0.0)
    )
    student.student_steps = None if kind == "teacher" else 4
    losses = {
        "teacher": lambda model, x, labels, progress: mcm.diffusion_loss(model, x, labels),
        "ct": lambda model, x, labels, progress: mcm.consistency_loss(
            model, x, labels, multistep(4), progress=progress
        ),
        "cd": lambda model, x, labels, progress: mcm.consistency_loss(
            model, x, labels, multistep(4), teacher=teacher, progress=progress
        ),
    }

    @functools.wraps(losses[kind])
    def watched(*arguments):
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if 2 <= len(calls) < STEPS else "default")
        return losses[kind](*arguments)

    try:
        train(
            student,
            watched,
            data,
            Training(STEPS, 32, precision="bf16", augment=True, log_every=100, save_every=100),
            tmp_path,
            "model",
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == STEPS


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_has_the_same_gradients(precision, tmp_path, monkeypatch):
    """To rounding. (Weights after Adam's first steps would say nothing: a gradient of rounding size
    moves a weight by a whole step, in a direction that rounding decides.)
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # 1e-3 of rounding by itself
    data = load_data("digits").to(DEVICE)
    gradients = []
    for compiled in (False, True):
        student, teacher = (filled(seed).to(DEVICE) for seed in (0, 1))
        student.student_steps = 4
        how = Training(1, 32, precision=precision, compile=compiled)
        run = DenoiserRun(f"model-{compiled}", student, how, tmp_path)
        teacher = run.frozen(teacher.requires_grad_(False).eval())
        for _ in run:
            for x, labels, t, noise in run.parts(data):
                asked = {"teacher": teacher, "t": t, "noise": noise}
                run.backward(mcm.consistency_loss(run.model, x, labels, multistep(4), **asked))
            gradients.append([p.grad.clone() for p in student.parameters()])
            run.update()
    plain, compiled = (torch.cat([g.flatten() for g in grads]) for grads in gradients)
    rounding = 0.03 if precision == "bf16" else 1e-3  # bf16: 0.014 on a CPU
    assert (plain - compiled).norm() < rounding * plain.norm() and plain.norm() > 1
