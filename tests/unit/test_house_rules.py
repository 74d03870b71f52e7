"""Rules of CONTRIBUTING.md that no linter knows: sizes, and a docstring for every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES, FUNCTION_LINES = 500, 40


def ours() -> Iterator[tuple[str, str]]:
    for folder in ("lbctl", "manager", "agent"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text("utf-8")


def test_files_and_functions_stay_small_and_modules_say_what_they_are() -> None:
    wrong = []
    for name, text in ours():
        tree = ast.parse(text)
        if not ast.get_docstring(tree):
            wrong.append(f"{name}: no docstring")
        if len(text.splitlines()) >= LINES:
            wrong.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION_LINES:
                    wrong.append(f"{name}:{node.lineno}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_nobody_leaves_a_note_instead_of_code() -> None:
    words = ("TO" + "DO", "FIX" + "ME")
    found = [name for name, text in ours() if any(word in text for word in words)]
    assert not found
