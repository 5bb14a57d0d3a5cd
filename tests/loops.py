"""A training loop for tests."""

from mcm.lab.run import DenoiserRun


def train(denoiser, loss, data, settings, out, name, resume=False, preview=None, **metadata):
    """A training loop as in run_cifar.py, with any loss(model, x, labels, progress)."""
    run = DenoiserRun(name, denoiser, settings, out, resume, **metadata)
    for step in run:
        for x, labels, _, _ in run.parts(data):
            run.backward(loss(run.model, x, labels, run.progress))
        run.update()
        if preview and run.at_checkpoint:
            preview(run.averaged, step + 1)
    return run.averaged
