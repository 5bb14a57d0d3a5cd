"""Every complete notebook runs from top to bottom in a clean kernel, its own answers are right, and
it is committed as executed; the student's copies give nothing away.
"""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent / "tutorials"
COMPLETE = sorted(ROOT.glob("*_complete.ipynb"))
STUDENTS = [path.with_name(path.name.replace("_complete", "")) for path in COMPLETE]


def number(path):
    return path.name[:2]


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPLETE, ids=number)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # beside another; its networks are small
    folder = tmp_path / "tutorials"
    shutil.copytree(ROOT, folder)  # what a notebook writes stays out of the repository
    notebook = nbformat.read(path, 4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "Warning" not in text
    assert ": right." in text and ": not yet." not in text and "nothing here" not in text


@pytest.mark.parametrize("path", COMPLETE, ids=number)
def test_a_complete_notebook_is_committed_as_executed(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert path.stat().st_size < 800_000
    assert not re.search(r"/(home|root|tmp|Users|work)/", path.read_text())


@pytest.mark.parametrize("path", STUDENTS, ids=number)
def test_a_students_copy_gives_nothing_away(path):
    cells = nbformat.read(path, 4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert "assert " not in code and "**Solution" not in path.read_text()
    assert all(call.endswith(", ...)") for call in re.findall(r"^guess\(.*", code, re.M))
    for cell in cells:
        if cell.cell_type == "code":
            compile(cell.source, path.name, "exec")


def test_notebooks_one_to_six_close_with_three_exercises():
    assert len(COMPLETE) == 8
    for path in STUDENTS[:6]:
        levels = re.findall(r"\d\. \*\*\((easy|medium|hard)\)", path.read_text())
        assert levels == ["easy", "medium", "hard"], path.name


def test_notebooks_one_to_four_need_the_core_only():
    for path in STUDENTS[:4]:
        text = path.read_text()
        assert not re.search(r"(diffusers|transformers|peft|mcm\.latent)", text), path.name


def test_links_lead_somewhere():
    for path in [*COMPLETE, ROOT / "README.md"]:
        texts = (
            [path.read_text()]
            if path.suffix == ".md"
            else [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
        )
        for target in (t for text in texts for t in re.findall(r"\]\(([^)#:]+)[^):]*\)", text)):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_weights_are_small():
    files = [p for p in (ROOT / "weights").rglob("*") if p.is_file()]
    sizes = {p: p.stat().st_size for p in files}
    latent = sum(size for p, size in sizes.items() if "latent" in p.parts)
    assert max(sizes.values()) < 8_000_000 and latent < 10_000_000
    assert sum(sizes.values()) - latent < 25_000_000
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for p in files:
        assert not re.search(rb"/(home|root|tmp|Users|work)/", p.read_bytes()), p
