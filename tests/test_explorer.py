"""The pages that move, in a real browser: the course's, whose numbers are the library's, and that
of a run, which shows the run's pictures. Handles follow mouse and keys. Skipped where there is no
Chromium.
"""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import mcm
import run_cifar
from mcm.lab import explorer
from mcm.lab.data import load_data

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -r requirements-dev.txt")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "tutorials" / "explorer.html"
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromium-driver are missing"),
]
SCHEDULE = mcm.CosineSchedule()
MIXTURE = mcm.GaussianMixture(
    torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([0.2, 0.2]).double()
)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    quiet = ("background-networking", "component-update", "sync", "gpu")
    for flag in ("headless=new", "no-sandbox", "no-first-run", *(f"disable-{q}" for q in quiet)):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    browser.set_window_size(1280, 1000)
    browser.get(PAGE.as_uri())
    yield browser
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def said(page, figure):
    return page.find_element(By.CSS_SELECTOR, f"#{figure} output").text


def dot(page, figure, name):
    return page.find_element(By.CSS_SELECTOR, f"#{figure} [role=slider][aria-label='{name}']")


def value(handle):
    return float(handle.get_attribute("aria-valuenow"))


def drag(page, handle, across, down, moves):
    """With the mouse, in so many moves."""
    chain = ActionChains(page, duration=10).click_and_hold(handle)
    for i in range(moves):
        step = [round(d * (i + 1) / moves) - round(d * i / moves) for d in (across, down)]
        chain = chain.move_by_offset(*step)
    chain.release().perform()


def swipe(page, node, across, down, moves=10):
    """With a finger, from the middle of a node on."""
    where = "const r = arguments[0].getBoundingClientRect();"
    x, y = page.execute_script(where + "return [r.x + r.width / 2, r.y + r.height / 2]", node)

    def touch(kind, share=None):
        points = [] if share is None else [{"x": x + across * share, "y": y + down * share}]
        event = {"type": f"touch{kind}", "touchPoints": points}
        page.execute_cdp_cmd("Input.dispatchTouchEvent", event)

    touch("Start", 0)
    for i in range(moves):
        touch("Move", (i + 1) / moves)
    touch("End")


def wait(page, until):
    """A finger's events come with the next frames."""
    WebDriverWait(page, 5).until(lambda _: until())


def as_phone(page, path, width=360):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    page.get(path.as_uri())


def time(t):
    return torch.tensor([t]).double()


def answer(z, i, K, T):
    """The perfect student's, from the library's sampler and inverse of a DDIM step."""
    q = (i - 1) // (T // K) * (T // K)
    z_t = torch.tensor([[z]]).double()
    z_q = z_t
    for n in range(i, q, -1):
        x_hat = MIXTURE(z_q, time(n / T))
        z_q = mcm.ddim(x_hat, z_q, time(n / T), time((n - 1) / T), SCHEDULE)
    return mcm.inverse_ddim(z_q, z_t, time(i / T), time(q / T), SCHEDULE).item()


@pytest.mark.parametrize(
    "z, i, K, T",
    [(0.3, 64, 1, 64), (0.3, 64, 2, 64), (-1.7, 40, 2, 64), (0.05, 33, 4, 64), (2.0, 8, 8, 16)],
)
def test_the_students_answer_is_the_librarys(page, z, i, K, T):
    assert page.execute_script(f"return student({z}, {i}, {K}, {T})") == pytest.approx(
        answer(z, i, K, T), abs=1e-6
    )


@pytest.mark.parametrize("z, t", [(0.3, 0.5), (-1.2, 0.9), (0.01, 0.2), (3.0, 1.0), (0.4, 0.05)])
def test_the_teachers_answer_is_the_librarys(page, z, t):
    expected = MIXTURE(torch.tensor([[z]]).double(), time(t)).item()
    assert page.execute_script(f"return teacher({z}, {t})") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "t, s, q", [(0.8, 0.5, 0.2), (0.8, 0.5, 0.5), (0.8, 0.5, 0), (1, 0.9, 0.5)]
)
def test_the_teachers_weight_is_the_librarys(page, t, s, q):
    one = torch.ones(1, 1).double()
    expected = mcm.solvers.joined_aim(one, 0 * one, time(t), time(s), time(q), SCHEDULE).item()
    assert page.execute_script(f"return rho({t}, {s}, {q})") == pytest.approx(expected, abs=1e-6)


def test_the_spread_of_addim_is_the_librarys(page):
    """An image of 400 evenly spread numbers, as the page has it."""
    u = (torch.arange(400).double() + 0.5) / 400
    z = (math.sqrt(2) * torch.erfinv(2 * u - 1))[None]

    class Pixels(torch.nn.Module):
        schedule = SCHEDULE

        def forward(self, z, t, cond=None):
            return MIXTURE(z.reshape(-1, 1), t.expand(z.numel())).reshape(z.shape)

    def step(x_hat, z_t, t, s, schedule):
        alpha, sigma = schedule(t)
        v = 0.04 * alpha**2 + sigma**2
        p = torch.sigmoid(2 * alpha * z_t / v)  # of the right hump
        means = [(sigma**2 * m + 0.04 * alpha * z_t) / v for m in (-1, 1)]
        square = (1 - p) * means[0] ** 2 + p * means[1] ** 2
        x_var = (0.04 * sigma**2 / v + square - x_hat**2).mean(1)
        return mcm.addim(x_hat, z_t, t, s, schedule, 0.75 * x_var)

    expected = mcm.sample(Pixels(), z, steps=8, solver=step).std(correction=0).item()
    told = float(re.search(r"spread ([\d.]+)", said(page, "addim"))[1])
    assert told == pytest.approx(expected, abs=2e-6)  # printed with six places


def test_what_the_page_says_of_the_limits(page):
    s, q = dot(page, "chord", "time s"), dot(page, "chord", "time q")
    s.send_keys(Keys.HOME)
    assert "ρ = 1.000000" in said(page, "chord")
    q.send_keys(Keys.HOME)
    s.send_keys(Keys.PAGE_UP)
    assert value(q) == 0 and "ρ = 0.000000" in said(page, "chord")


def test_jumps_end_where_the_road_ends(page):
    for K in ("1", "2", "4", "8", "64"):
        select = Select(page.find_element(By.CSS_SELECTOR, "#dial [data-name=K]"))
        select.select_by_visible_text(K)
        road, jumps = re.findall(r"ends? at (-?[\d.]+)|jumps at (-?[\d.]+)", said(page, "dial"))
        assert road[0] == jumps[1]


def test_a_sweep_brings_one_row_and_without_an_anchor_none(page):
    sweeps = dot(page, "climb", "sweeps")
    sweeps.send_keys(Keys.HOME)
    for n in range(1, 4):
        sweeps.send_keys(Keys.ARROW_RIGHT)
        assert said(page, "climb").startswith(f"{n} sweeps: {n} of 16 rows are right")
    select = Select(page.find_element(By.CSS_SELECTOR, "#climb [data-name=K]"))
    select.select_by_visible_text("4")
    assert "12 of 16 rows are right" in said(page, "climb")
    select.select_by_visible_text("1")
    page.find_element(By.CSS_SELECTOR, "#climb [data-name=free]").click()
    assert "0 of 16 rows are right; loss of the last sweep 0.0e+0" in said(page, "climb")


@pytest.mark.parametrize(
    "figure, name, across, up",
    [
        ("chord", "time q", 80, 0),
        ("climb", "sweeps", 120, 0),
        ("dial", "z at t = 1", 0, 60),
        ("cliff", "width of the slope", 100, 0),
        ("addim", "share of the variance", -100, 0),
        ("noise", "eta", 100, 0),
        ("noise", "start of the error", -100, 0),
    ],
)
def test_a_handle_follows_the_mouse_and_the_keys(page, figure, name, across, up):
    handle = dot(page, figure, name)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
    before, text = value(handle), said(page, figure)
    drag(page, handle, across, -up, moves=1)
    once = value(handle)
    assert (once - before) * (across + up) > 0 and said(page, figure) != text
    drag(page, handle, -across, up, moves=1)
    drag(page, handle, across, -up, moves=20)  # as a hand does it
    dragged = value(handle)
    assert dragged == pytest.approx(once, abs=0.051)
    dot(page, figure, name).send_keys(Keys.ARROW_LEFT)
    assert value(dot(page, figure, name)) < dragged


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.get(PAGE.as_uri())
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_page_is_alone():
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(https?:)?//", text) and len(text) < 100_000
    for target in re.findall(r'href="([^"#]+)', text):
        assert (PAGE.parent / target).exists(), target


def test_both_pages_share_their_style_and_handles():
    """Written once, in mcm/lab/page; the course's page has a copy inside, as it is one file."""
    text = PAGE.read_text(encoding="utf-8")
    for part in ("style.css", "figures.js"):
        assert (ROOT / "mcm/lab/page" / part).read_text(encoding="utf-8") in text, part


# --- the page of a run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a minute, with the three pictures of it that the page must agree with."""
    out = tmp_path_factory.mktemp("run") / "digits"
    sizes = "--preset tiny --channels 16 --teacher-iterations 20 --student-iterations 4"
    more = "--classifier-iterations 20 --samples 128 --steps 1 4"
    command = f"--data digits {sizes} {more} --out {out}"
    assert run_cifar.run(command.split()) == 0
    return out


@pytest.fixture
def run_page(browser, run):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    browser.set_window_size(1280, 1000)
    browser.get((run / "explorer.html").as_uri())
    yield browser
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


DOTS = """
const done = arguments[arguments.length - 1], tile = arguments[0], picture = new Image();
picture.onload = () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const n = document.querySelectorAll("#steps .tile").length, size = picture.width / n;
  const column = Math.round(parseFloat(tile.style.backgroundPosition) / 100 * (n - 1));
  const data = context.getImageData(size * column, 0, size, size).data;
  done(Array.from(data).filter((_, i) => i % 4 === 0));
};
picture.src = tile.style.backgroundImage.slice(5, -2);
"""


def tiles(page):
    return page.find_elements(By.CSS_SELECTOR, "#steps .tile")


def drawn(run, name, steps, n=40):
    """What the library draws from the page's noise, as bytes."""
    data = load_data("digits")
    config = run_cifar.parse(["--data", "digits", "--preset", "tiny"])
    z, labels = run_cifar.to_draw(n, config, data)
    images = mcm.sample(mcm.load(run / f"{name}.safetensors"), z, steps, labels)
    return ((images.clamp(-1, 1) + 1) * 127.5).round().long()


def test_the_slider_shows_the_images_of_each_k(run_page, run):
    slider = dot(run_page, "steps", "steps K")
    slider.send_keys(Keys.HOME)
    for name, steps in (("cd-1", 1), ("teacher", 2), ("cd-4", 4), ("teacher", 8)):
        assert said(run_page, "steps").startswith(f"K = {steps}: {name[:2].replace('cd', 'st')}")
        wanted = drawn(run, name, steps)
        for i in (0, 13, 39):
            shown = torch.tensor(run_page.execute_async_script(DOTS, tiles(run_page)[i]))
            assert (shown - wanted[i].flatten()).abs().max() <= 1, (name, i)
        run_page.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT)  # from anywhere
    dot(run_page, "steps", "steps K").send_keys(Keys.END)
    assert said(run_page, "steps").startswith("K = 64 = ∞: teacher in 64 steps")


def test_the_teacher_in_as_many_steps_is_a_click_away(run_page, run):
    dot(run_page, "steps", "steps K").send_keys(Keys.HOME)
    student = run_page.execute_async_script(DOTS, tiles(run_page)[5])
    run_page.find_element(By.CSS_SELECTOR, "#steps [data-name=teacher]").click()
    assert "teacher in 1 step," in said(run_page, "steps")
    teacher = torch.tensor(run_page.execute_async_script(DOTS, tiles(run_page)[5]))
    assert (teacher - drawn(run, "teacher", 1)[5].flatten()).abs().max() <= 1
    assert teacher.tolist() != student
    rows = json.loads((run / "results.json").read_text(encoding="utf-8"))["rows"]
    found = next(r["frechet"] for r in rows if (r["model"], r["steps"]) == ("teacher", 1))
    shown = f"{found:.0f}" if found >= 100 else f"{found:.3g}"
    assert f"Fréchet distance {shown}." in said(run_page, "steps")


def test_a_click_opens_the_path_of_what_is_shown(run_page):
    box = run_page.find_element(By.CSS_SELECTOR, "#path div[data-name=left]")
    assert "K = 4, student" in box.text  # as above it
    dot(run_page, "steps", "steps K").send_keys(Keys.HOME)
    tiles(run_page)[12].click()
    assert said(run_page, "path") == "Image 13: 2."
    assert "K = 1, student" in box.text
    run_page.find_element(By.CSS_SELECTOR, "#steps [data-name=teacher]").click()
    assert "K = 1, teacher" in box.text
    other = run_page.find_element(By.CSS_SELECTOR, "#path div[data-name=right]")
    assert "K = 64 = ∞, teacher (8 of 64 steps)" in other.text
    for side, K, model in (("left", 4, "student"), ("right", 2, "teacher")):
        select = Select(run_page.find_element(By.CSS_SELECTOR, f"#path select[data-name={side}]"))
        select.select_by_visible_text(f"{K}, {model}")
        box = run_page.find_element(By.CSS_SELECTOR, f"#path div[data-name={side}]")
        assert f"K = {K}, {model}" in box.text
        # z_t and x_hat of each step, the image and its nearest neighbour
        assert len(box.find_elements(By.CSS_SELECTOR, "[role=img]")) == 2 * K + 2


def test_the_slider_by_hand(run_page):
    """A drag in many moves, a press on its line, keys after another control, what is read out."""
    slider = dot(run_page, "steps", "steps K")
    assert slider.get_attribute("aria-valuetext") == "4"
    drag(run_page, slider, 120, 0, moves=30)
    assert said(run_page, "steps").startswith("K = 8:")
    rail = run_page.find_element(By.CSS_SELECTOR, "#steps .rail")
    ActionChains(run_page).move_to_element_with_offset(rail, 300, 0).click().perform()
    assert slider.get_attribute("aria-valuetext") == "64 = ∞"
    run_page.find_element(By.CSS_SELECTOR, "#steps [data-name=teacher]").click()
    ActionChains(run_page).send_keys(Keys.ARROW_LEFT).perform()
    assert said(run_page, "steps").startswith("K = 32: teacher")


def test_the_slider_on_a_phone(run_page, run):
    as_phone(run_page, run / "explorer.html")
    slider = dot(run_page, "steps", "steps K")
    run_page.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
    swipe(run_page, slider, 120, 0)
    wait(run_page, lambda: value(slider) > 2)
    figure = run_page.find_element(By.CSS_SELECTOR, "#curve svg")
    run_page.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
    before = run_page.execute_script("return scrollY")
    swipe(run_page, figure, 0, 100)  # what is no handle scrolls
    wait(run_page, lambda: run_page.execute_script("return scrollY") < before)


def test_a_finger_on_the_courses_handles(page):
    as_phone(page, PAGE)
    for figure, name, across, down in (
        ("chord", "time q", 60, 0),
        ("dial", "z at t = 1", 0, -60),
        ("noise", "eta", 60, 0),
        ("noise", "start of the error", -60, 0),
    ):
        handle = dot(page, figure, name)
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
        before = value(handle)
        swipe(page, handle, across, down)
        wait(page, lambda: abs(value(handle) - before) > 0.1)  # noqa: B023


def test_a_class_can_be_chosen(run_page):
    select = Select(run_page.find_element(By.CSS_SELECTOR, "#steps [data-name=filter]"))
    select.select_by_visible_text("7")
    left = [tile for tile in tiles(run_page) if tile.is_displayed()]
    assert len(left) == 4 and all("7" in tile.get_attribute("title") for tile in left)


def test_the_marker_moves_along_the_curve(run_page):
    places = set()
    slider = dot(run_page, "steps", "steps K")
    slider.send_keys(Keys.HOME)
    for _ in range(7):
        marker = run_page.find_element(By.CSS_SELECTOR, "#curve .marker")
        places.add((marker.get_attribute("cx"), marker.get_attribute("cy")))
        dot(run_page, "steps", "steps K").send_keys(Keys.ARROW_RIGHT)
    assert len(places) == 7


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_of_a_run_fits_the_window(run_page, run, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    run_page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    run_page.get((run / "explorer.html").as_uri())
    assert run_page.execute_script("return document.documentElement.scrollWidth") <= width
    before = said(run_page, "steps")
    drag(run_page, dot(run_page, "steps", "steps K"), 60, 0, moves=6)
    assert said(run_page, "steps") != before


def test_long_captions_fit_a_phone(browser, tmp_path):
    views = [explorer.View("teacher", 1, torch.zeros(2, 3, 8, 8), {"nfe": 1, "sampler": "ddim"})]
    views[0].row["seconds_per_image"] = 0.1
    captions = ["a small red circle above a large blue square on black " * 2, "a cat"]
    explorer.save_page(tmp_path / "page.html", views, captions, "caption", "shapes", "a note")
    as_phone(browser, tmp_path / "page.html")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
