#!/usr/bin/env python3
"""Make the student's copy of each notebook from the complete one beside it, NAME_complete.ipynb.

    python tutorials/make.py                  all of them
    python tutorials/make.py --execute 02     run the complete second one first

A complete notebook is an ordinary one in which comments mark what is left to the student:

    # your turn: what goes here, and its shape
    # your turn (3 statements): the same for so many

The student's copy keeps the comment; behind it stands `...`. It has no outputs, no guesses, no
asserts (they hold the answers) and no cells that begin with **Solution**; what a figure shows is
folded away until it is asked for.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent
BLANK = re.compile(r"\s*# your turn(?: \((\d+) statements\))?:")


def bodies(tree: ast.AST) -> list[list[ast.stmt]]:
    """Every list of statements, outer ones first."""
    lists = (getattr(node, name, None) for node in ast.walk(tree) for name in ("body", "orelse"))
    return [found for found in lists if isinstance(found, list) and found]


def blanked(source: str) -> str:
    """A complete cell as the student gets it."""
    lines, tree = source.splitlines(), ast.parse(source)
    changes = []  # first line, last line, what stands there instead
    for number, line in enumerate(lines, 1):
        if marker := BLANK.match(line):
            body = min(
                (body for body in bodies(tree) if body[-1].lineno > number),
                key=lambda body: next(s.lineno for s in body if s.lineno > number),
            )
            below = [s for s in body if s.lineno > number][: int(marker[1] or 1)]
            changes.append((below[0].lineno, below[-1].end_lineno, shell(below, source)))
    gone = []
    for node in ast.walk(tree):  # outer ones first
        if (isinstance(node, ast.Assert) or only_asserts(node)) and node.lineno not in gone:
            gone += range(node.lineno, node.end_lineno + 1)
            changes.append((node.lineno, node.end_lineno, None))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "guess":
            text = f"guess({ast.get_source_segment(source, node.args[0])}, ...)"
            changes.append((node.lineno, node.end_lineno, text))
    for first, last, text in sorted(changes, key=lambda change: -change[0]):
        indent = re.match(r"\s*", lines[first - 1])[0]
        lines[first - 1 : last] = [] if text is None else [indent + text]
    return "\n".join(lines).rstrip()


def only_asserts(node: ast.AST) -> bool:
    """An `if` or a loop of which nothing would be left."""
    body = getattr(node, "body", None)
    empty = isinstance(body, list) and body and not getattr(node, "orelse", None)
    return bool(empty) and all(isinstance(s, ast.Assert) for s in body)


def shell(statements: list[ast.stmt], source: str) -> str:
    """What is left of statements: the names that a single one gives a value to, or its return."""
    if len(statements) == 1 and isinstance(statements[0], ast.Assign):
        return f"{ast.get_source_segment(source, statements[0].targets[0])} = ..."
    if len(statements) == 1 and isinstance(statements[0], ast.Return):
        return "return ..."
    return "..."


def folded(text: str) -> str:
    """The first paragraph, if it is a caption, behind a line to click on."""
    if not text.startswith("*") or text.startswith("**"):
        return text
    caption, *rest = text.split("\n\n", 1)
    hidden = f"<details><summary>What the figure shows</summary>\n\n{caption}\n\n</details>"
    return "\n\n".join([hidden, *rest])


def student_copy(complete: nbformat.NotebookNode) -> nbformat.NotebookNode:
    notebook = nbformat.from_dict(complete)
    kept = [cell for cell in notebook.cells if not cell.source.startswith("**Solution")]
    for cell in kept:
        if cell.cell_type == "code":
            cell.source, cell.outputs, cell.execution_count = blanked(cell.source), [], None
        else:
            cell.source = folded(cell.source)
    notebook.cells = [cell for cell in kept if cell.source]
    return notebook


def execute(path: Path) -> nbformat.NotebookNode:
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # no progress bars
            cell.outputs = [o for o in cell.outputs if not re.search(r"\d%\|", o.get("text", ""))]
    notebook.metadata.pop("language_info", None)
    return notebook


def main(argv: list[str]) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("names", nargs="*", metavar="NN", help="only those that begin so")
    parser.add_argument("--execute", action="store_true", help="first run the complete ones")
    args = parser.parse_args(argv)
    for path in sorted(FOLDER.glob("*_complete.ipynb")):
        if path.name.startswith(tuple(args.names or [""])):
            notebook = execute(path) if args.execute else nbformat.read(path, 4)
            nbformat.write(notebook, path)
            target = path.with_name(path.name.replace("_complete", ""))
            nbformat.write(student_copy(notebook), target)
            print(target.name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
