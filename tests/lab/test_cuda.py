"""What only a CUDA GPU can show; skipped elsewhere."""

import functools

import pytest
import torch
from loops import train

import mcm
from mcm import multistep
from mcm.lab.data import load_data
from mcm.lab.run import Training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
STEPS = 8


@pytest.mark.parametrize("kind", ["teacher", "ct", "cd"])
def test_a_training_step_never_waits_for_the_gpu(kind, tmp_path):
    """Choosing the batch, the loss, its gradient and the update, between the second step and the
    last but one: PyTorch raises at the synchronisations it knows of.
    """
    data, calls = load_data("digits").to(torch.device("cuda")), []
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


def test_a_compiled_step_trains_the_same_weights(tmp_path):
    """To rounding: how far a few steps move them, with and without torch.compile."""
    data, moves = load_data("digits").to(torch.device("cuda")), []
    for compiled in (False, True):
        torch.manual_seed(0)
        teacher, student = (
            mcm.Denoiser(mcm.UNet(8, 1, 32, (1, 1), 1, (4,), 10), mcm.CosineSchedule()).cuda()
            for _ in range(2)
        )
        before = torch.cat([p.detach().flatten() for p in student.parameters()])
        settings = Training(5, 32, lr=1e-3, warmup=0, compile=compiled)
        train(
            student,
            lambda m, x, labels, progress, teacher=teacher: mcm.consistency_loss(
                m, x, labels, multistep(4), teacher=teacher
            ),
            data,
            settings,
            tmp_path,
            f"model-{compiled}",
        )
        moves.append(torch.cat([p.flatten() for p in student.parameters()]) - before)
    assert (moves[0] - moves[1]).norm() < 0.05 * moves[0].norm()
