"""The shape of the house: three rooms, imports that run one way, sizes that are promised."""

import ast
import io
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "mcm").rglob("*.py"))
PAPER = [p for p in PACKAGE if p.parent == ROOT / "mcm"]
FOLDERS = ("mcm", "tests", "benchmarks", "tutorials")
PYTHON = [*ROOT.glob("*.py"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))]


def name(path):
    """mcm/lab/run.py -> ("mcm", "lab", "run")"""
    return path.relative_to(ROOT).with_suffix("").parts


def imports(path):
    """The files of ours that this one imports, at any depth of nesting."""
    found = set()
    package = name(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [tuple(a.name.split(".")) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [base, *(base + (a.name,) for a in node.names)]
        else:
            continue
        found |= {n for n in names if ROOT.joinpath(*n).with_suffix(".py").is_file()}
    return found


GRAPH = {name(path): imports(path) for path in PACKAGE if path.name != "__init__.py"}


def room(file):
    return file[1] if len(file) == 3 else "paper"


def test_no_room_imports_from_one_above():
    allowed = {"paper": {"paper"}, "lab": {"paper", "lab"}, "latent": {"paper", "lab", "latent"}}
    assert {room(file) for file in GRAPH} == set(allowed)
    for file, needed in GRAPH.items():
        assert {room(n) for n in needed} <= allowed[room(file)], file
    assert ("mcm", "schedule") in GRAPH["mcm", "solvers"]  # it sees imports at all


def test_there_is_no_circle():
    done = set()

    def visit(file, path):
        assert file not in path, (*path, file)
        if file not in done:
            for needed in GRAPH[file]:
                visit(needed, (*path, file))
            done.add(file)

    for file in GRAPH:
        visit(file, ())
    assert len(done) == len(GRAPH)


def test_the_lab_knows_no_method_by_name():
    names = ("cd", "ct", "mlcm", "tlcm", "scott", "lcm")
    for path in (ROOT / "mcm" / "lab").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                assert node.value not in names, (path, node.lineno)


def code_lines(path):
    """Without blank lines, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    dropped = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for child in body if isinstance(body, list) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                dropped.update(range(child.lineno, child.end_lineno + 1))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    used = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in {*blank, tokenize.ENDMARKER}:
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - dropped)


def test_the_paper_can_be_read_in_one_sitting_and_the_rest_in_an_afternoon():
    assert sum(map(code_lines, PAPER)) <= 700
    scripts = [ROOT / "run_cifar.py", ROOT / "run_latent.py"]
    assert sum(map(code_lines, [*PACKAGE, *scripts])) <= 5400
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 150


def test_the_training_loops_are_near_the_top():
    tree = ast.parse((ROOT / "run_cifar.py").read_text(encoding="utf-8"))
    ends = {node.name: node.end_lineno for node in tree.body if hasattr(node, "name")}
    order = sorted(ends, key=ends.get)[:4]
    assert order == ["Config", "main", "train_teacher", "train_student"]
    assert ends["train_student"] < 250


def test_pages_are_100_columns_wide_and_formatted():
    for path in PYTHON:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{path.relative_to(ROOT)}:{number}"
    done = subprocess.run(["ruff", "format", "--check", "."], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.name != "__init__.py"], ids=str)
def test_no_function_is_longer_than_a_page(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            assert node.end_lineno - node.lineno + 1 - doc.count("\n") - bool(doc) <= 60, node.name


def test_every_text_file_is_utf_8_by_name():
    """Else a Windows machine or an old locale cannot read what another has written."""
    for path in (p for p in PYTHON if p.relative_to(ROOT).parts[0] != "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            where = getattr(getattr(node.func, "value", None), "id", "")
            if name in ("open", "read_text", "write_text") and where not in ("Image", "os"):
                modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
                binary = name == "open" and any("b" in mode for mode in modes)
                named = any(keyword.arg == "encoding" for keyword in node.keywords)
                assert binary or named, f"{path.relative_to(ROOT)}:{node.lineno}"
