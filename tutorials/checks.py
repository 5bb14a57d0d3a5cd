"""Answers to the notebooks' questions: `check` says right, or what kind of wrong; never the answer.

Each check is a list of cases: what to ask of an answer, what must come out, and what some wrong
values would mean. tests/test_checks.py shows that plausible wrong answers are refused.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from bugs import MISTAKES, broken
from torch import Tensor, nn

import mcm
from mcm.latent.recipes import RECIPES

schedule = mcm.CosineSchedule()
mixture = mcm.GaussianMixture(
    means=torch.tensor([[-1.0], [1.0]]).double(), stds=torch.tensor([0.2, 0.2]).double()
)
GUESSES: dict[str, Any] = {}


def guess(question: str, value: Any) -> None:
    """Note a guess, before the cell that answers the question. A wrong one teaches more."""
    if value is ...:
        print(f"{question} ? Write your guess in place of the dots, and run this cell again.")
    else:
        GUESSES[question] = value
        print(f"Noted: {question} {value}")


class Told(Exception):
    """Raised while asking: what is wrong, in the words that the student is told."""


class Case(NamedTuple):
    where: str
    """Where it must be right, as the student reads it: "at s = t"."""
    ask: Callable[[Any], Any]
    """answer -> the value to compare."""
    expected: Any
    tolerance: float = 1e-6
    traps: tuple[tuple[Any, str], ...] = ()
    """Wrong values, and what each of them means."""
    otherwise: str = "the numbers are others"
    infinite: str = "not every number is finite"


def check(name: str, answer: Any) -> None:
    """Print whether an answer is right, or where it is right and where and how it is wrong.

    Raises KeyError if no question has this name.
    """
    if answer is ...:
        print(f"{name}: nothing here yet.")
        return
    found = [(case.where, fault(case, answer)) for case in CHECKS[name]()]
    wrong = [f"   Wrong {where}: {what}." for where, what in found if what]
    if len(wrong) == len(found) > 3 and len({what for _, what in found}) == 1:
        wrong = [f"   Wrong everywhere: {found[0][1]}."]
    good = "; ".join(where for where, what in found if not what)
    print(f"{name}: not yet." if wrong else f"{name}: right.", *wrong, sep="\n")
    if wrong and good:
        print(f"   Right {good}.")


def fault(case: Case, answer: Any) -> str | None:
    """What is wrong in this case, or None."""
    try:
        value = case.ask(answer)
    except Told as told:
        return str(told)
    except Exception as error:  # the student's code: whatever it raises is what they must see
        if "ellipsis" in str(error):
            return "there is still a `...` in it"
        return f"it stops with {type(error).__name__}: {error}"
    if value is None or value is ...:
        return "nothing comes out (a return is missing?)"
    try:
        value = torch.as_tensor(value, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        return f"a {type(value).__name__} comes out, and numbers are asked for"
    expected = torch.as_tensor(case.expected, dtype=torch.float64)
    if value.shape != expected.shape:
        return f"the shape is {tuple(value.shape)}, and should be {tuple(expected.shape)}"
    if not value.isfinite().all():
        return case.infinite
    if close(value, expected, case.tolerance):
        return None
    for trap, meaning in case.traps:
        if close(value, torch.as_tensor(trap, dtype=torch.float64), case.tolerance):
            return meaning
    return case.otherwise


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(((a - b).abs() <= tolerance * b.abs().clamp_min(1)).all())


def numbers(n: int, seed: int = 0) -> Tensor:
    # not the numbers that a student gets after manual_seed(0)
    generator = torch.Generator().manual_seed(31_415 + seed)
    return torch.randn(n, generator=generator, dtype=torch.float64)


def at(value: float, n: int) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


# Notebook 1 --------------------------------------------------------------------------------------


def of_posterior_mean() -> list[Case]:
    z = 2 * numbers(9)

    def case(where: str, t: float, *traps) -> Case:
        true = mixture(z[:, None], at(t, 9))[:, 0]
        return Case(where, lambda f: f(z, at(t, 9)), true, traps=traps)

    alpha, sigma = math.cos(math.pi / 4), math.sin(math.pi / 4)
    variance = 0.04 * alpha**2 + sigma**2
    each = [(sigma**2 * mean + alpha * 0.04 * z) / variance for mean in (-1, 1)]
    likelier = torch.where(z > 0, each[1], each[0])
    even = sum(each) / 2
    return [
        case("at t = 1, where z says nothing", 1.0),
        case("at t = 0.05, with hardly any noise", 0.05),
        case(
            "at t = 0.5",
            0.5,
            (likelier, "this is the likelier hump's answer; a mean counts both"),
            (even, "both humps count equally here; z tells which is likelier"),
            (sum(each), "the two do not add up to one answer: are the weights normalised?"),
        ),
    ]


def of_score() -> list[Case]:
    z = 2 * numbers(9)

    def true(t: float) -> Tensor:
        points = z.clone().requires_grad_()
        alpha, sigma = schedule(torch.tensor(t))
        deviation = (0.04 * alpha**2 + sigma**2).sqrt()
        humps = torch.distributions.Normal(torch.stack([-alpha, alpha]), deviation)
        log_density = torch.logsumexp(humps.log_prob(points[:, None]), 1) - math.log(2)
        return torch.autograd.grad(log_density.sum(), points)[0].double()

    def asked(t: float) -> Callable:
        return lambda f: f(mixture(z[:, None], at(t, 9))[:, 0], z, torch.tensor(t).double())

    half = true(0.5)
    noise = -half * math.sin(math.pi / 4)
    traps = ((noise, "this is the noise itself"), (-half, "the sign is the other one"))
    traps += ((-noise, "the noise points the right way, and has another scale"),)
    return [
        Case("at t = 0.5", asked(0.5), half, 1e-5, traps),
        Case("at t = 0.9", asked(0.9), true(0.9), 1e-5),
    ]


def of_ddim() -> list[Case]:
    x, z = numbers(5, 1), numbers(5, 2)

    def case(where: str, t: float, s: float, traps=()) -> Case:
        true = mcm.ddim(x[:, None], z[:, None], at(t, 5), at(s, 5), schedule)[:, 0]
        return Case(where, lambda f: f(x, z, at(t, 1), at(s, 1)), true, traps=traps)

    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(at(0.8, 1)), schedule(at(0.3, 1))
    noise = (z - alpha_t * x) / sigma_t
    traps = (
        (alpha_s * x + sigma_t * noise, "the noise keeps its old scale, sigma_t"),
        (alpha_s * x + sigma_s * z, "z_t is taken for the noise; it is a mixture of both"),
        (alpha_t * x + sigma_s * noise, "x_hat keeps its old scale, alpha_t"),
    )
    return [
        case("at s = t, where nothing moves", 0.6, 0.6),
        case("at s = 0, where no noise is left", 0.6, 0.0),
        case("in between", 0.8, 0.3, traps),
    ]


def of_addim() -> list[Case]:
    x, z = numbers(24, 1).view(3, 8), numbers(24, 2).view(3, 8)
    t, s, x_var = at(0.8, 3), at(0.4, 3), torch.tensor([0.1, 0.3, 0.6]).double()
    keep, gain = mcm.solvers.coefficients(t, s, schedule)
    sigma_s = schedule(s)[1]
    noise = mcm.solvers.eps_hat(x, z, t, schedule)

    def stretched(variance: Tensor) -> Tensor:
        return schedule(s)[0][:, None] * x + (sigma_s**2 + variance)[:, None].sqrt() * noise

    length = noise.square().mean(1)
    traps = (
        (mcm.ddim(x, z, t, s, schedule), "this is DDIM: the noise part is not longer"),
        (stretched(gain**2 * x_var), "divided by nothing: |eps_hat|^2 / d is missing"),
        (stretched(x_var / length), "x_var itself is added; only a part of it reaches z_s"),
        (stretched(gain**2 * x_var / (8 * length)), "|eps_hat|^2 is not divided by d"),
        (
            stretched(gain**2 * x_var / noise.square().mean()),
            "one length for the whole batch; each image has its own",
        ),
    )
    true = mcm.addim(x, z, t, s, schedule, x_var)
    plain = mcm.ddim(x, z, t, s, schedule)
    return [
        Case("at x_var = 0", lambda f: f(x, z, t, s, schedule, 0 * x_var), plain),
        Case(
            "with a variance for each image",
            lambda f: f(x, z, t, s, schedule, x_var),
            true,
            traps=traps,
        ),
    ]


def of_heavier() -> list[Case]:
    return [
        Case(
            "in x_hat at t = 1",
            lambda a: a[0],
            -0.5,
            0.01,
            ((0.5, "the other hump is heavier"), (0.0, "that is the even mixture's")),
        ),
        Case(
            "in the share that flows left",
            lambda a: a[1],
            0.75,
            0.02,
            ((0.25, "this share flows right"), (0.5, "equal shares would need equal weights")),
        ),
    ]


def of_times() -> list[Case]:
    def even_in_log(steps: int, L: float) -> Tensor:
        ends = torch.linspace(math.log(L), -math.log(L), steps - 1, dtype=torch.float64)
        return torch.cat([at(1.0, 1), 2 / math.pi * torch.atan(ends.exp())])

    long = "one time too many: mcm.sample adds the step to 0, and this makes one more evaluation"

    def count(f: Callable) -> int:
        return len(f(8, 5.0))

    return [
        Case("in the number of evaluations", count, 8, traps=((9, long),)),
        Case("in the times", lambda f: f(8, 5.0), even_in_log(8, 5.0)),
        Case("with another L", lambda f: f(16, 20.0), even_in_log(16, 20.0)),
    ]


def exact_end(z: Tensor) -> Tensor:
    """Where the ODE takes standard normal z: order and mass are kept, so F(x) = Phi(z)."""
    share = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    low, high = torch.full_like(z, -4.0), torch.full_like(z, 4.0)
    for _ in range(60):
        x = (low + high) / 2
        below = sum(0.25 * (1 + torch.erf((x - m) / (0.2 * math.sqrt(2)))) for m in (-1, 1))
        low, high = torch.where(below < share, x, low), torch.where(below < share, high, x)
    return (low + high) / 2


def of_heun() -> list[Case]:
    z = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]

    def error(f: Callable, steps: int) -> Tensor:
        return (f(z, steps) - exact_end(z)).square().mean().sqrt()

    def order(f: Callable) -> Tensor:
        return torch.log2(error(f, 64) / error(f, 128))

    traps = (
        (1.0, "first order: one slope counts alone, or the reference is another method"),
        (1.55, "x_hat is averaged; near t = 1 that is a poor mean of the slopes"),
    )
    return [
        Case("sample by sample, in 256 steps", lambda f: f(z, 256), exact_end(z), 2e-3),
        Case("in the order of the error", order, 2.0, 0.1, traps),
    ]


# Notebook 2 --------------------------------------------------------------------------------------


def of_rho() -> list[Case]:
    ask = {
        "at s = q, where the student has no say": ((0.7, 0.5, 0.5), 1.0),
        "at q = 0, the consistency model": ((0.7, 0.5, 0.0), 0.0),
        "at s = q = 0, the last grid point": ((0.1, 0.0, 0.0), 1.0),
    }

    def asked(*times: float) -> Callable:
        return lambda f: f(*(at(time, 1) for time in times))

    def true(t: float, s: float, q: float) -> Tensor:
        x = torch.tensor([[1.0]]).double()  # the teacher aims at 1, the student at 0
        times = (at(time, 1) for time in (t, s, q))
        return mcm.solvers.joined_aim(x, 0 * x, *times, schedule)[0]

    swapped = (1 - true(0.7, 0.5, 0.3), "the two weights have changed places")
    return [
        *(Case(where, asked(*times), [value]) for where, (times, value) in ask.items()),
        Case("at t = 1, where lambda is infinite", asked(1.0, 0.8, 0.5), true(1.0, 0.8, 0.5), 1e-4),
        Case("in between", asked(0.7, 0.5, 0.3), true(0.7, 0.5, 0.3), traps=(swapped,)),
    ]


class Scaled(nn.Module):
    """A student with one weight, to have a gradient: x_hat = weight tanh(2 z) (1 - t / 2)."""

    schedule = schedule

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7).double())

    def forward(self, z: Tensor, t: Tensor, cond: None = None) -> Tensor:
        return self.weight * torch.tanh(2 * z) * (1 - t[:, None] / 2)


def loss_and_slope(loss: Callable[[Scaled], Tensor]) -> Tensor:
    student = Scaled()
    value = loss(student)
    (slope,) = torch.autograd.grad(value, student.weight)
    return torch.stack([value.detach(), slope])


def library_loss(student: nn.Module, x, t, noise, T: int, K: int, teacher, weight="v") -> Tensor:
    method = mcm.Method(K, (T, T), x_var=None, distance="squared", weight=weight)
    return mcm.consistency_loss(student, x, None, method, teacher=teacher, t=t, noise=noise).loss


FLOWS = "the number is right, and its gradient is not: does one flow through the target?"


def asked_with_slope(loss: Callable[[Scaled], Tensor], true: Tensor) -> Tensor:
    """-> the loss, if its gradient is right or it is itself not."""
    student = Scaled()
    value = loss(student)
    if not isinstance(value, Tensor):
        return value
    if value.ndim:
        raise Told(f"it has the shape {tuple(value.shape)}; a number is asked for, a mean")
    if not value.requires_grad:
        raise Told("it has no gradient: the student's answer at t must carry one")
    slope = torch.autograd.grad(value, student.weight)[0]
    if close(value.detach(), true[0], 1e-6) and not close(slope, true[1], 1e-6):
        raise Told(FLOWS)
    return value


def of_my_loss() -> list[Case]:
    T, n = 16, 64
    x, noise = (mixture.means[torch.arange(n) % 2], numbers(n)[:, None])
    t = (torch.arange(n) % T + 1).double() / T

    def case(where: str, K: int, teacher) -> Case:
        both = loss_and_slope(lambda f: library_loss(f, x, t, noise, T, K, teacher))

        unweighted = library_loss(Scaled(), x, t, noise, T, K, teacher, "x").item()
        traps = ((unweighted, "of clean images; a v-loss divides them by sigma_t"),)
        border = "not every number is finite: to which segment does a border belong?"
        return Case(
            where,
            lambda mine: asked_with_slope(lambda f: mine(f, x, t, noise, T, K, teacher), both),
            both[0],
            traps=traps,
            infinite=border,
        )

    return [
        case("at K = T, with images (CT)", T, None),
        case("at K = T, with a teacher (CD)", T, mixture),
        case("at K = 4, with images", 4, None),
        case("at K = 4, with a teacher", 4, mixture),
        case("at K = 1, with a teacher", 1, mixture),
    ]


def of_sweeps() -> list[Case]:
    nearer = "that is for K = 1; a segment's end is nearer"
    pairs = ((64, 4, 16.0), (64, 64, 1.0))
    return [
        Case("for K = 1", lambda f: f(64, 1), 64.0, traps=((1.0, "one sweep carries it one row"),)),
        *(
            Case(f"for K = {K}", lambda f, T=T, K=K: f(T, K), n, traps=((T, nearer),))
            for T, K, n in pairs
        ),
    ]


def of_chord() -> list[Case]:
    first = 'look again at how a DDIM step goes in z / alpha ("road" or "chord")'
    second = 'which road passes through that point? ("same" or "another")'
    return [
        Case("in where the sample is", lambda a: a[0] == "chord", True, otherwise=first),
        Case("in where it leads", lambda a: a[1] == "another", True, otherwise=second),
    ]


def of_three() -> list[Case]:
    def lam(time: float) -> float:
        return math.tan(math.pi * time / 2)

    t, r, s, q = lam(0.9), lam(0.8), lam(0.6), lam(0.2)
    true = torch.tensor([q / r - q / t, q / s - q / r, 1 - q / s]).double() / (1 - q / t)

    def asked(f: Callable) -> Tensor:
        return torch.stack(
            [
                torch.as_tensor(w).double().flatten()[0]
                for w in f(*(at(u, 1) for u in (0.9, 0.8, 0.6, 0.2)))
            ]
        )

    return [
        Case("in their sum", lambda f: asked(f).sum(), 1.0),
        Case(
            "one by one",
            asked,
            true,
            traps=(
                (true.flip(0), "the order is reversed"),
                (true[[1, 0, 2]], "a_1 and a_2 have changed places"),
            ),
        ),
    ]


def of_slopes() -> list[Case]:
    quarter = ((0.25, "that is the argument's prediction; what do the numbers say?"),)
    return [
        Case("for K = 1", lambda a: abs(a[0]), 0.312, 0.03, quarter),
        Case("for K = 4", lambda a: abs(a[1]), 0.41, 0.03, quarter),
        Case("for K = 16", lambda a: abs(a[2]), 0.76, 0.04, quarter),
    ]


# Notebook 3 --------------------------------------------------------------------------------------


def of_song_loss() -> list[Case]:
    T, n, d = 16, 64, 3
    noise = numbers(n * d).view(n, d)
    x = mixture.means[torch.arange(n * d) % 2].view(n, d)

    def case(where: str, rows: Tensor) -> Case:
        t = rows.double() / T
        true = loss_and_slope(lambda f: library_loss(f, x, t, noise, T, 1, None))
        unweighted = library_loss(Scaled(), x, t, noise, T, 1, None, "x").item()
        traps = ((d * true[0], "summed over an image's numbers; a mean is asked for"),)
        traps += ((unweighted, "the weight 1 / sigma_t^2 is missing"),)
        ask = lambda mine: asked_with_slope(lambda f: mine(f, x, t, noise, T), true)  # noqa: E731
        return Case(where, ask, true[0], traps=traps)

    return [
        case("above the lowest grid point", torch.arange(n) % (T - 1) + 2),
        case("at the lowest, where f(x, 0) = x", torch.ones(n)),
    ]


def of_boundary() -> list[Case]:
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    alpha, sigma = schedule(t)
    sign = ((sigma, "its sign"),)
    skip = ((sigma, "that is sigma"), (alpha**2, "that belongs to z / alpha"))
    return [
        Case("in c_skip", lambda f: f(t)[0], alpha, traps=skip),
        Case("in c_out", lambda f: f(t)[1], -sigma, traps=sign),
    ]


def of_order() -> list[Case]:
    traps = (
        (2.0, "halve the step, and look at what happens to the error"),
        (0.5, "that is slower"),
    )
    return [Case("in its size", lambda a: abs(a), 1.0, 0.1, traps)]


def of_factor() -> list[Case]:
    t = torch.linspace(0.1, 1, 7, dtype=torch.float64)
    sigma = schedule(t)[1]
    traps = (
        (torch.ones(7), "then the gradients would be the same; compute both"),
        (1 / sigma**2, "upside down"),
        (sigma, "per residual; the loss is squared"),
    )
    return [Case("at every t", lambda f: f(t), sigma**2, traps=traps)]


def of_wrong_teacher() -> list[Case]:
    copies = "so near to the data? A student copies its teacher's mistakes"
    far = "a perfect student makes its teacher's own samples, from the same noise"
    return [
        Case("in the distance to its teacher at K = 64", lambda a: a[0] < 1e-3, 1.0, otherwise=far),
        Case("in W2 at K = 1", lambda a: a[1], 0.296, 0.01, otherwise=copies),
    ]


# Notebook 4 --------------------------------------------------------------------------------------


class Direction(nn.Module):
    """Some answer that depends on z, t and the label, to follow jumps with."""

    schedule = schedule
    student_steps = 4

    def forward(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return torch.tanh(2 * z + t[:, None, None, None]) * (1 + cond)[:, None, None, None]


def of_jumps() -> list[Case]:
    z, labels = numbers(128, 3).view(2, 1, 8, 8), torch.tensor([0, 1])
    student = Direction()

    def case(where: str, K: int, *traps) -> Case:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one student for every K will do here
            true = mcm.sample(student, z, K, labels)
        return Case(where, lambda f: f(student, z, K, labels), true, traps=traps)

    answer, t = z, at(1.0, 2)
    straight = student(z, t, labels)
    for k in (4, 3, 2, 1):
        answer = student(answer, at(k / 4, 2), labels)
    first = mcm.ddim(straight, z, t, at(0.75, 2), schedule)
    return [
        case("in one step", 1, (z, "nothing has moved")),
        case(
            "in four",
            4,
            (straight, "every jump goes to t = 0; it should end at its segment's border"),
            (answer, "x_hat is taken for the place; it is a direction"),
            (first, "only the first jump is made"),
        ),
    ]


def of_guided_digits() -> list[Case]:
    other = "look at the three numbers again"
    return [Case("in which way", lambda a: a == "rises", True, otherwise=other)]


def of_copying() -> list[Case]:
    zero = ((0.0, "a copier's quantile; are these the samples?"),)
    copier = "a copier's low quantiles are near 0, and these are not"
    return [
        Case("in the samples' quantile", lambda a: a[0], 0.18, 0.03, zero),
        Case("in the held-out digits'", lambda a: a[1], 0.18, 0.03),
        Case("in the conclusion", lambda a: bool(a[2]), False, otherwise=copier),
    ]


def of_teachers_help() -> list[Case]:
    less = ((-3.7, "the sign: a smaller distance is better"),)
    small = "two seeds differ by less than the teacher helps; or is this another difference?"
    return [
        Case("in the teacher's help", lambda a: a[0], 3.7, 0.35, less),
        Case("in the seeds", lambda a: 0 <= a[1] < 1.5, True, otherwise=small),
    ]


# Notebooks 5 and 6 ------------------------------------------------------------------------------


def of_guided_answer() -> list[Case]:
    null, caption = numbers(8, 1), numbers(8, 2)
    traps = (
        (caption + 3 * (caption - null), "this is w = 4: with this form omega = w - 1"),
        (caption + 3 * (null - caption), "away from the caption"),
        (null + 3 * (null - caption), "away from the caption"),
    )
    return [
        Case("at w = 0, without the caption", lambda f: f(null, caption, 0.0), null),
        Case("at w = 1, the conditional answer", lambda f: f(null, caption, 1.0), caption),
        Case(
            "at w = 3",
            lambda f: f(null, caption, 3.0),
            null + 3 * (caption - null),
            traps=traps,
        ),
    ]


def of_renoised() -> list[Case]:
    x, fresh = numbers(32, 1).view(2, 4, 2, 2), numbers(32, 2).view(2, 4, 2, 2)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    discrete = mcm.DiscreteSchedule(torch.cumprod(1 - betas, 0))  # SDXL's
    s = torch.tensor([0.25, 0.75]).double()
    alpha, sigma = (a[:, None, None, None] for a in discrete(s))
    traps = ((x + sigma * fresh, "x_hat keeps its size"), (alpha * x, "nothing is fresh here"))
    true = alpha * x + sigma * fresh
    # SDXL's levels are float32
    return [Case("at two times", lambda f: f(x, s, fresh), true, 1e-4, traps)]


def of_second_chance() -> list[Case]:
    other = "compare the printed shares in 8 steps"
    return [Case("in the name", lambda a: a == "re-noised", True, otherwise=other)]


def of_guided_twice() -> list[Case]:
    other = "compare w = 3 with w = 1"
    return [
        Case("in the distance", lambda a: a[0] == "worse", True, otherwise=other),
        Case("in the share", lambda a: a[1] == "worse", True, otherwise=other),
    ]


def of_prompts_alone() -> list[Case]:
    true = {n for n in RECIPES if not RECIPES[n](4).needs_images}
    other = "where does z_t come from in each phase?"
    return [
        Case("in what you said", lambda a: set(a[0]) == true, True, otherwise=other),
        Case("in what ran", lambda a: set(a[1]) == true, True, otherwise="something else stopped"),
    ]


def of_random_step() -> list[Case]:
    x, z, fresh = (numbers(6, n)[:, None] for n in (1, 2, 3))
    t, s = at(0.8, 6), at(0.5, 6)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([a[:, None] for a in schedule(u)] for u in (t, s))
    noise = (z - alpha_t * x) / sigma_t

    def step(eta: float, kept: Tensor | None = None, root: bool = True) -> Tensor:
        ratio = 1 - (alpha_t / alpha_s) ** 2
        new = eta * sigma_s / sigma_t * (ratio.sqrt() if root else ratio)
        kept = (sigma_s**2 - new**2).sqrt() if kept is None else kept
        return alpha_s * x + kept * noise + new * fresh

    traps = (
        (step(0.6, sigma_s), "the old noise is not shortened: too much noise in all"),
        (step(0.6, root=False), "the square root is missing"),
    )
    return [
        Case("at eta = 0, DDIM", lambda f: f(x, z, t, s, 0.0, fresh), step(0.0)),
        Case("at eta = 1", lambda f: f(x, z, t, s, 1.0, fresh), step(1.0)),
        Case("at eta = 0.6", lambda f: f(x, z, t, s, 0.6, fresh), step(0.6), traps=traps),
    ]


COLUMNS = ("segments", "z_t from", "sub-steps", "averaged target", "adversary")


def of_recipes() -> list[Case]:
    def row(name: str) -> tuple:
        phase = RECIPES[name](5).phases[0]
        segments = phase.method.student_steps
        return (
            "K" if segments == 5 else segments,
            phase.states,
            phase.method.sub_steps,
            phase.target_ema is not None,
            any("adversarial" in kind for kind, _ in phase.objectives),
        )

    def same(n: int) -> Callable[[dict], bool]:
        true = [row(name)[n] for name in RECIPES]  # True is not 1 here
        return lambda a: [(type(a[k][n]), a[k][n]) for k in RECIPES] == [(type(v), v) for v in true]

    text = "at least one row is not as in the recipes"
    return [Case(f"in {c}", same(n), True, otherwise=text) for n, c in enumerate(COLUMNS)]


def of_old_share() -> list[Case]:
    amplitude = "that is the share of the amplitude; the variance is its square"
    traps = ((0.1 ** (0.3**2), amplitude), (1 - 0.1 ** (2 * 0.3**2), "that is the fresh share"))
    true = 0.1 ** (2 * 0.3**2)
    return [
        Case("at eta = 0", lambda f: f(10.0, 1.0, 0.0), 1.0),
        Case("at eta = 0.3", lambda f: f(10.0, 1.0, 0.3), true, traps=traps),
    ]


def of_gaussian_student() -> list[Case]:
    shape = "one normal distribution has one"
    return [
        Case("in the standard deviation", lambda a: a[0], 1.02, 0.1),
        Case("in the humps", lambda a: bool(a[1]), False, otherwise=shape),
    ]


# Notebooks 7 and 8 --------------------------------------------------------------------------------


def of_papers() -> list[Case]:
    phases = {name: RECIPES[name](4).phases[0] for name in RECIPES}
    true = {
        "a": {n for n, p in phases.items() if p.method.student_steps > 1 and p.states != "data"},
        "b": {n for n, p in phases.items() if p.method.sub_steps > 1},
        "c": {n for n in RECIPES if not RECIPES[n](4).renoise},
    }

    def same(key: str) -> Callable[[dict], bool]:
        def ask(answer: dict) -> bool:
            if not isinstance(answer, dict) or set(answer) != set(true):
                raise Told('a dictionary is needed, with "a", "b" and "c"')
            names = [answer[key]] if isinstance(answer[key], str) else answer[key]
            return {name.lower() for name in names} == true[key]

        return ask

    hints = {
        "a": "look at student_steps and states of the first lines",
        "b": "look at sub_steps of the first lines",
        "c": "whose x_hat is no image, at more than one step?",
    }
    return [Case(f"in {key}", same(key), True, otherwise=hint) for key, hint in hints.items()]


def of_renoising() -> list[Case]:
    noise = numbers(400, 4).view(400, 1)
    asked = []

    class Watched(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            asked.append((z, t))
            return 0.5 * torch.tanh(z)

    def ask(f: Callable) -> Tensor:
        """-> how the second z was made: (noise - what it should be) as three numbers."""
        asked.clear()
        answer = f(Watched(), noise, [1.0, 0.5])
        if len(asked) != 2:
            raise Told("at two times the student should be asked twice")
        (z, _), (second, t) = asked
        x_hat = 0.5 * torch.tanh(noise)
        alpha, sigma = (a[0] for a in schedule(at(0.5, 1)))
        fresh = (second - alpha * x_hat) / sigma
        if (answer - 0.5 * torch.tanh(second)).abs().max() > 1e-6:
            raise Told("what is returned should be the last answer")
        if (fresh * noise).mean() / noise.square().mean() > 0.5:
            raise Told("the noise is the old one; it should be new at every time")
        if (second - x_hat).abs().max() < 1e-6:
            raise Told("nothing was noised")
        return torch.stack([(fresh.std() - 1).abs() < 0.15, fresh.mean().abs() < 0.2])

    true = torch.tensor([True, True])
    return [Case("in what it asks next", ask, true, otherwise="alpha x_hat + sigma noise")]


def of_matching() -> list[Case]:
    def ask(answer: tuple) -> float:
        step, real, fake, scale = answer
        right = (real - fake) / scale
        if (step + right).abs().max() < 1e-6:
            raise Told("the sign: this drives the samples away from the data")
        if (step - real + fake).abs().max() < 1e-6 or (step - right * scale**2).abs().max() < 1e-6:
            raise Told("the scale: divide by it")
        return (step - right).abs().max().item() < 1e-6

    return [Case("in the step", ask, True, otherwise="(x_fake - x_real) / scale, against it")]


def of_bugs() -> list[Case]:
    true = {letter: loss.args[0] for letter, loss in broken.items()}
    found = "a mistake is found when an experiment shows it that the other three pass"
    return [
        Case("in the letters", lambda a: sorted(a) == sorted(true), True, otherwise="A, B, C, D"),
        Case(
            "in the names",
            lambda a: sorted(a.values()) == sorted(MISTAKES),
            True,
            otherwise="each once",
        ),
        Case("in who has which", lambda a: a == true, True, otherwise=f"not all four; {found}"),
    ]


CHECKS: dict[str, Callable[[], list[Case]]] = {
    "posterior_mean": of_posterior_mean,
    "score": of_score,
    "ddim": of_ddim,
    "addim": of_addim,
    "1.1": of_heavier,
    "1.2": of_times,
    "1.3": of_heun,
    "rho": of_rho,
    "my_loss": of_my_loss,
    "sweeps": of_sweeps,
    "2.1": of_chord,
    "2.2": of_three,
    "2.3": of_slopes,
    "song_loss": of_song_loss,
    "c_skip, c_out": of_boundary,
    "3.1": of_order,
    "3.2": of_factor,
    "3.3": of_wrong_teacher,
    "jumps": of_jumps,
    "4.1": of_guided_digits,
    "4.2": of_copying,
    "4.3": of_teachers_help,
    "guided_answer": of_guided_answer,
    "renoised": of_renoised,
    "5.1": of_second_chance,
    "5.2": of_guided_twice,
    "5.3": of_prompts_alone,
    "random_step": of_random_step,
    "6.1": of_recipes,
    "6.2": of_old_share,
    "6.3": of_gaussian_student,
    "papers": of_papers,
    "renoised in 1D": of_renoising,
    "matching": of_matching,
    "bugs": of_bugs,
}
