"""The notebooks' checks: each right answer is accepted, each plausible wrong one refused, and told
what kind of wrong it is.
"""

import math
import sys
from pathlib import Path

import nbformat
import pytest
import torch

import mcm

TUTORIALS = Path(__file__).resolve().parent.parent / "tutorials"
sys.path.insert(0, str(TUTORIALS))
import checks  # noqa: E402
import make  # noqa: E402
from checks import mixture, schedule  # noqa: E402


def alpha_sigma(*times):
    return [tuple(a[:, None] for a in schedule(t)) for t in times]


# Notebook 1


def posterior(z, t):
    alpha, sigma = (a[..., None] for a in schedule(t))
    variance = 0.04 * alpha**2 + sigma**2
    means = torch.tensor([-1.0, 1.0]).double()
    p = torch.softmax(-((z[..., None] - alpha * means) ** 2) / (2 * variance), -1)
    return p, (sigma**2 * means + 0.04 * alpha * z[..., None]) / variance


def mean_of(pick):
    return lambda z, t: pick(*posterior(z, t))


def likelier(p, mean):
    return mean.gather(-1, p.argmax(-1, keepdim=True))[..., 0]


def score(factor):
    def of(x_hat, z, t):
        alpha, sigma = schedule(t)
        return factor(sigma) * (z - alpha * x_hat)

    return of


def ddim(x_hat, z, t, s, x_scale=None, noise_scale=None, noise=None):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    noise = (z - alpha_t * x_hat) / sigma_t if noise is None else noise
    x_scale = alpha_t if x_scale == "old" else alpha_s
    return x_scale * x_hat + (sigma_t if noise_scale == "old" else sigma_s) * noise


def addim(x_hat, z, t, s, schedule, x_var, gain=True, length="each", d=1):
    keep, g = mcm.solvers.coefficients(t, s, schedule)
    noise = mcm.solvers.eps_hat(x_hat, z, t, schedule)
    each = {"each": (noise**2).mean(1), "batch": (noise**2).mean(), "none": 1.0}[length]
    variance = (g**2 if gain else 1) * x_var / each / d
    alpha_s, sigma_s = (a[:, None] for a in schedule(s))
    return alpha_s * x_hat + (sigma_s**2 + variance[:, None]).sqrt() * noise


def times(steps, L):
    ends = torch.linspace(math.log(L), -math.log(L), steps - 1)
    return [1.0, *(2 / math.pi * torch.atan(ends.double().exp())).tolist()]


def even(steps, L):
    return torch.linspace(1, 0, steps + 1)[:-1].tolist()


def heun(z, steps, average="noise", last=True):
    grid = torch.linspace(1, 0, steps + 1).double()
    for t, s in zip(grid[:-1], grid[1:]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        t_all, s_all = t.expand(len(z)), s.expand(len(z))
        x_t = mixture(z, t_all)
        z_s = mcm.ddim(x_t, z, t_all, s_all, schedule)
        if s == 0:
            return z_s
        x_s = mixture(z_s, s_all)
        if t == 1 or average == "x":
            z = mcm.ddim((x_t + x_s) / 2, z, t_all, s_all, schedule)
        elif average == "none":
            z = z_s
        else:
            slope = ((z - alpha_t * x_t) / sigma_t + (z_s - alpha_s * x_s) / sigma_s) / 2
            z = alpha_s * (z / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * slope)


# Notebook 2


def rho(t, s, q, swapped=False, bottom=1.0, same=None, at_zero=None):
    lam_s, lam_q = (schedule(u)[1] / schedule(u)[0] for u in (s, q))
    inverse = schedule(t)[0] / schedule(t)[1]
    weight = lam_q / lam_s * (1 - lam_s * inverse) / (1 - lam_q * inverse)
    weight = torch.where(s == 0, bottom, 1 - weight if swapped else weight)
    weight = weight if same is None else torch.where(s == q, same, weight)
    return weight if at_zero is None else torch.where((q == 0) & (s > 0), at_zero, weight)


def rho_in_lambda(t, s, q):
    lam_t, lam_s, lam_q = (schedule(u)[1] / schedule(u)[0] for u in (t, s, q))
    weight = lam_q * (lam_t - lam_s) / (lam_s * (lam_t - lam_q))
    return torch.where(s == 0, 1.0, weight)


def loss(student, x, t, noise, T, K, teacher=None, **wrong):
    i = torch.round(t * T)
    q = torch.floor((i - (0 if "border" in wrong else 1)) / (T / K)) / K
    s = (i - 1) / T
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, s)
    weight = rho(t, s, q)[:, None]
    z_t = alpha_t * x + sigma_t * noise
    with torch.set_grad_enabled("gradient" in wrong):
        x_teacher = x if teacher is None or "no teacher" in wrong else teacher(z_t, t)
        eps = noise if "true noise" in wrong else (z_t - alpha_t * x_teacher) / sigma_t
        z_s = alpha_s * x_teacher + sigma_s * eps
        at = t if "time" in wrong else s
        x_s = student(z_s, at)
        target = weight * x_teacher + (1 - weight) * x_s
    difference = target - student(z_t, t)
    return ((difference if "unweighted" in wrong else difference / sigma_t) ** 2).mean()


def three(t, r, s, q, order=1, forget=False):
    lam_t, lam_r, lam_s, lam_q = (schedule(u)[1] / schedule(u)[0] for u in (t, r, s, q))
    weights = lam_q / lam_r - lam_q / lam_t, lam_q / lam_s - lam_q / lam_r, 1 - lam_q / lam_s
    return [w / (1 if forget else 1 - lam_q / lam_t) for w in weights][::order]


# Notebook 3


def song(student, x, t, noise, T, fresh=False, gradient=False, boundary=True):
    s = t - 1 / T
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, s)
    z_t = alpha_t * x + sigma_t * noise
    torch.manual_seed(0)  # as in the notebook
    z_s = alpha_s * x + sigma_s * (torch.randn_like(x) if fresh else noise)
    with torch.set_grad_enabled(gradient):
        below = student(z_s, s)
        below = torch.where((s < 1e-9)[:, None], x, below) if boundary else below
    return (((student(z_t, t) - below) / sigma_t) ** 2).mean()


# Notebook 4


def jumps(student, z, K, labels, to_zero=False, place=False):
    for k in range(K, 0, -1):
        t, q = (torch.full((len(z),), n / K).double() for n in (k, 0 if to_zero else k - 1))
        x = student(z, t, labels)
        z = x if place else mcm.ddim(x, z, t, q, schedule)
        if to_zero:
            return z
    return z


# Notebooks 5 and 6


BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
DISCRETE = mcm.DiscreteSchedule(torch.cumprod(1 - BETAS, 0))


def renoised(x_hat, s, fresh, keep=False, noise=True):
    alpha_s, sigma_s = (a[:, None, None, None] for a in DISCRETE(s))
    return (1 if keep else alpha_s) * x_hat + sigma_s * fresh * noise


def random_step(x_hat, z_t, t, s, eta, fresh, root=True, shorten=True):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, s)
    ratio = 1 - (alpha_t / alpha_s) ** 2
    new = eta * sigma_s / sigma_t * (ratio.sqrt() if root else ratio)
    old = (sigma_s**2 - new**2 * shorten).sqrt()
    return alpha_s * x_hat + old * (z_t - alpha_t * x_hat) / sigma_t + new * fresh


TABLE = {
    "cm": (1, "data", 1, False, False),
    "mcm": ("K", "data", 1, False, False),
    "lcm": (1, "data", 1, True, False),
    "mlcm": (8, "teacher", 1, False, False),
    "tlcm": (8, "teacher", 1, False, False),
    "scott": (1, "data", 3, True, True),
}


def wrong(function, **how):
    return lambda *args: function(*args, **how)


def renoised_1d(student, noise, times, old=False, plain=False, kept=False):
    z = noise
    for n, t in enumerate(times):
        x_hat = student(z, torch.full((len(z),), t).double())
        if n + 1 < len(times):
            alpha, sigma = schedule(torch.tensor(times[n + 1]).double())
            fresh = noise if old else torch.randn_like(z)
            z = (
                x_hat
                if plain
                else (1.0 if kept else alpha) * x_hat + (2 if kept else 1) * sigma * fresh
            )
    return x_hat


REAL, FAKE = torch.randn(2, 32, 1, generator=torch.Generator().manual_seed(5)).double()

RIGHT = {
    "posterior_mean": mean_of(lambda p, mean: (p * mean).sum(-1)),
    "score": score(lambda sigma: -1 / sigma**2),
    "ddim": ddim,
    "addim": lambda *args: torch.where(args[3][:, None] == 0, args[0], addim(*args)),
    "1.1": (-0.5, 0.75),
    "1.2": times,
    "1.3": heun,
    "rho": rho,
    "my_loss": loss,
    "sweeps": lambda T, K: T / K,
    "2.1": ("chord", "another"),
    "2.2": three,
    "2.3": (-0.31, -0.41, -0.76),
    "song_loss": song,
    "c_skip, c_out": lambda t: (schedule(t)[0], -schedule(t)[1]),
    "3.1": -1.01,
    "3.2": lambda t: schedule(t)[1] ** 2,
    "3.3": (2.7e-5, 0.2954),
    "jumps": jumps,
    "4.1": "rises",
    "4.2": (torch.tensor(0.183), 0.181, False),
    "4.3": (3.69, 0.24),
    "guided_answer": lambda null, caption, w: null + w * (caption - null),
    "renoised": renoised,
    "5.1": "re-noised",
    "5.2": ("worse", "worse"),
    "5.3": ({"mlcm", "tlcm"}, {"tlcm", "mlcm"}),
    "random_step": random_step,
    "6.1": TABLE,
    "6.2": lambda begin, end, eta: (end / begin) ** (2 * eta**2),
    "6.3": (1.0, False),
    "papers": {"a": {"mlcm", "tlcm"}, "b": "scott", "c": ["mcm"]},
    "renoised in 1D": renoised_1d,
    "matching": (-0.5 * (FAKE - REAL), REAL, FAKE, torch.tensor(2.0)),
    "bugs": {letter: loss.args[0] for letter, loss in checks.broken.items()},
}
# name, wrong answer, what must be said about it
WRONG = [
    ("posterior_mean", mean_of(likelier), "likelier hump"),
    ("posterior_mean", mean_of(lambda p, mean: mean.mean(-1)), "both humps count equally"),
    ("posterior_mean", mean_of(lambda p, mean: mean.sum(-1)), "normalised"),
    ("posterior_mean", mean_of(lambda p, mean: p * mean), "the shape is (9, 2)"),
    ("posterior_mean", lambda z, t: None, "a return is missing"),
    ("score", score(lambda sigma: 1 / sigma**2), "the sign"),
    ("score", score(lambda sigma: 1 / sigma), "the noise itself"),
    ("score", score(lambda sigma: -1 / sigma), "another scale"),
    ("ddim", wrong(ddim, noise_scale="old"), "its old scale, sigma_t"),
    ("ddim", wrong(ddim, x_scale="old"), "its old scale, alpha_t"),
    ("ddim", lambda x, z, t, s: ddim(x, z, t, s, noise=z), "taken for the noise"),
    ("ddim", lambda x, z, t, s: undefined, "NameError"),  # noqa: F821
    ("addim", lambda *a: addim(*a[:5], 0 * a[5]), "not longer"),
    ("addim", wrong(addim, length="none"), "|eps_hat|^2 / d is missing"),
    ("addim", wrong(addim, gain=False), "only a part of it reaches z_s"),
    ("addim", wrong(addim, length="batch"), "one length for the whole batch"),
    ("addim", wrong(addim, d=8), "not divided by d"),
    ("1.1", (0.5, 0.75), "the other hump is heavier"),
    ("1.1", (0.0, 0.5), "even mixture"),
    ("1.1", (-0.5, 0.25), "flows right"),
    ("1.2", lambda steps, L: [*times(steps + 1, L)], "one time too many"),
    ("1.2", even, "in the times"),
    ("1.3", wrong(heun, average="x"), "x_hat is averaged"),
    ("1.3", wrong(heun, average="none"), "first order"),
    ("1.3", lambda z, n: heun(z, n).flip(0), "sample by sample"),
    ("rho", wrong(rho, swapped=True), "changed places"),
    ("rho", wrong(rho, same=0.5), "at s = q"),
    ("rho", wrong(rho, at_zero=0.5), "at q = 0"),
    ("rho", wrong(rho, bottom=0.0), "the last grid point"),
    ("rho", rho_in_lambda, "at t = 1"),
    ("my_loss", wrong(loss, gradient=True), "flow through the target"),
    ("my_loss", wrong(loss, border=True), "to which segment does a border belong"),
    ("my_loss", lambda *a: [loss(*a).item()], "the shape is (1,)"),
    ("my_loss", lambda *a: loss(*a) * torch.ones(3, 1), "a mean"),
    ("my_loss", lambda *a: loss(*a) + ..., "there is still a `...` in it"),
    ("my_loss", wrong(loss, unweighted=True), "a v-loss"),
    ("my_loss", lambda *a: loss(*a, **{"no teacher": True}), "with a teacher"),
    ("my_loss", lambda *a: loss(*a, **{"true noise": True}), "with a teacher"),
    ("my_loss", wrong(loss, time=True), "at K = 4"),
    ("sweeps", lambda T, K: T, "a segment's end is nearer"),
    ("sweeps", lambda T, K: 1, "one row"),
    ("2.1", ("road", "another"), "look again"),
    ("2.1", ("chord", "same"), "which road passes"),
    ("2.1", "chord, another", "look again"),
    ("2.2", wrong(three, order=-1), "order is reversed"),
    ("2.2", lambda *a: [three(*a)[n] for n in (1, 0, 2)], "have changed places"),
    ("2.2", wrong(three, forget=True), "in their sum"),
    ("2.3", (-0.25, -0.25, -0.25), "the argument's prediction"),
    ("2.3", (-0.32, -0.44, -0.75), "for K = 4"),  # fitted over all grids, not the local slope
    ("song_loss", wrong(song, fresh=True), "above the lowest"),
    ("song_loss", wrong(song, gradient=True), "flow through the target"),
    ("song_loss", lambda *a: 3 * song(*a), "summed over"),
    ("song_loss", lambda *a: song(*a).detach(), "no gradient"),
    ("song_loss", wrong(song, boundary=False), "at the lowest"),
    ("c_skip, c_out", lambda t: schedule(t), "its sign"),
    ("c_skip, c_out", lambda t: schedule(t)[::-1], "that is sigma"),
    ("c_skip, c_out", lambda t: (schedule(t)[0] ** 2, -schedule(t)[1]), "z / alpha"),
    ("3.1", -2.0, "halve the step"),
    ("3.1", -0.5, "slower"),
    ("3.2", lambda t: torch.ones_like(t), "the gradients would be the same"),
    ("3.2", lambda t: 1 / schedule(t)[1] ** 2, "upside down"),
    ("3.2", lambda t: schedule(t)[1], "squared"),
    ("3.3", (2.7e-5, 0.0024), "copies its teacher's mistakes"),
    ("3.3", (0.2962, 0.2954), "distance to its teacher"),
    ("jumps", wrong(jumps, to_zero=True), "segment's border"),
    ("jumps", wrong(jumps, place=True), "it is a direction"),
    ("4.1", "falls", "look at the three numbers"),
    ("4.1", 1.3, "look at the three numbers"),
    ("4.2", (0.0, 0.18, True), "a copier's quantile"),
    ("4.2", (0.18, 0.18, True), "and these are not"),
    ("4.2", (0.25, 0.26, False), "the samples' quantile"),  # the medians
    ("4.3", (-3.69, 0.24), "the sign"),
    ("4.3", (0.24, 3.69), "in the seeds"),
    ("guided_answer", lambda null, caption, w: caption + w * (caption - null), "omega = w - 1"),
    ("guided_answer", lambda null, caption, w: null + w * (null - caption), "away from"),
    ("guided_answer", lambda null, caption, w: w * (caption - null), "at w = 0"),
    ("renoised", wrong(renoised, keep=True), "keeps its size"),
    ("renoised", wrong(renoised, noise=False), "nothing is fresh"),
    ("5.1", "along DDIM", "compare the printed shares"),
    ("5.1", "ddim", "compare the printed shares"),
    ("5.2", ("better", "worse"), "compare w = 3"),
    ("5.2", ("worse", "better"), "compare w = 3"),
    ("5.3", ({"cm", "mcm"}, {"mlcm", "tlcm"}), "where does z_t come from"),
    ("5.3", ({"mlcm"}, {"mlcm", "tlcm"}), "where does z_t come from"),
    ("random_step", wrong(random_step, root=False), "square root"),
    ("random_step", wrong(random_step, shorten=False), "too much noise"),
    ("6.1", TABLE | {"cm": (True, "data", 1, False, False)}, "in segments"),
    ("6.1", TABLE | {"scott": (1, "data", 1, True, True)}, "in sub-steps"),
    ("6.1", TABLE | {"lcm": (1, "data", 1, True, ...)}, "in adversary"),
    ("6.2", lambda begin, end, eta: (end / begin) ** (eta**2), "the amplitude"),
    ("6.2", lambda begin, end, eta: 1 - (end / begin) ** (2 * eta**2), "the fresh share"),
    ("6.3", (1.0, True), "one normal distribution"),
    ("6.3", (0.5, False), "the standard deviation"),
    ("papers", {"a": {"mcm"}, "b": {"scott"}, "c": {"mcm"}}, "Wrong in a"),
    ("papers", {"a": {"mlcm", "tlcm"}, "b": {"scott", "tlcm"}, "c": {"mcm"}}, "Wrong in b"),
    ("papers", ({"mlcm", "tlcm"}, "scott", "mcm"), "a dictionary is needed"),
    ("papers", ["mlcm", "scott", "mcm"], "a dictionary is needed"),
    ("renoised in 1D", wrong(renoised_1d, old=True), "the noise is the old one"),
    ("renoised in 1D", wrong(renoised_1d, plain=True), "nothing was noised"),
    ("renoised in 1D", wrong(renoised_1d, kept=True), "alpha x_hat + sigma noise"),
    ("renoised in 1D", lambda f, z, times: z, "asked twice"),
    ("matching", (0.5 * (FAKE - REAL), REAL, FAKE, torch.tensor(2.0)), "the sign"),
    ("matching", (REAL - FAKE, REAL, FAKE, torch.tensor(2.0)), "the scale"),
    ("matching", (2 * (REAL - FAKE), REAL, FAKE, torch.tensor(2.0)), "the scale"),
    ("matching", (REAL, REAL, FAKE, torch.tensor(2.0)), "against it"),
    ("bugs", dict(zip("ABCD", checks.MISTAKES)), "not all four"),
    ("bugs", dict.fromkeys("ABCD", "mask"), "each once"),
]


def said(name, answer, capsys):
    checks.check(name, answer)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", checks.CHECKS)
def test_a_right_answer_is_accepted(name, capsys):
    assert said(name, RIGHT[name], capsys) == f"{name}: right.\n"


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_answer_is_refused_and_told_why(number, capsys):
    name, answer, why = WRONG[number]
    text = said(name, answer, capsys)
    assert text.startswith(f"{name}: not yet.\n") and why in text, text


def test_every_check_has_been_tried_with_two_wrong_answers():
    tried = [name for name, _, _ in WRONG]
    assert all(tried.count(name) >= 2 for name in checks.CHECKS)


def test_nothing_is_no_answer(capsys):
    assert said("ddim", ..., capsys) == "ddim: nothing here yet.\n"
    assert "nothing comes out" in said("ddim", lambda *args: ..., capsys)


def test_a_guess_is_noted(capsys):
    checks.guess("How many?", ...)
    assert "Write your guess" in capsys.readouterr().out and "How many?" not in checks.GUESSES
    checks.guess("How many?", 3)
    assert checks.GUESSES.pop("How many?") == 3


# What the student gets


def test_a_marked_statement_is_blanked():
    complete = """
def f(x):
    y = 2 * x
    # your turn: its square, (n,)
    z = (
        y * y
    )
    assert z > 0
    if z > 3:
        assert z > 2
    # your turn: the root
    return z**0.5


guess("How much?", 3)
# your turn (2 statements): a and b
a = 1
b = 2
check("f", f)"""
    student = """
def f(x):
    y = 2 * x
    # your turn: its square, (n,)
    z = ...
    # your turn: the root
    return ...


guess("How much?", ...)
# your turn (2 statements): a and b
...
check("f", f)"""
    assert make.blanked(complete) == student


def test_a_caption_is_folded_away():
    folded = make.folded("*What one sees.*\n\nAnd so on.")
    assert folded.startswith("<details>") and folded.endswith("And so on.")
    assert make.folded("**Bold** text") == "**Bold** text"


COMPLETE = sorted(TUTORIALS.glob("*_complete.ipynb"))


@pytest.mark.parametrize("path", COMPLETE, ids=lambda p: p.name[:2])
def test_the_students_copy_is_made_from_the_complete_notebook(path):
    made = make.student_copy(nbformat.read(path, 4))
    assert made == nbformat.read(path.with_name(path.name.replace("_complete", "")), 4)
    text = nbformat.writes(made)
    assert '"outputs": []' in text and "**Solution" not in text
    blanks = sum("# your turn" in cell.source for cell in made.cells)
    assert blanks >= 2, "a student writes something"
