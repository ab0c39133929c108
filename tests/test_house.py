"""The house's walls: who may import whom, and what the package never does."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import loghook
import loghook.evaluate

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "loghook").rglob("*.py"))
BEHIND_THE_WALL = ("log", "factors", "influence", "project", "evaluate")
FORBIDDEN_MODULES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def show(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield every import of a file, inside functions as well, as (line, absolute dotted name).

    ``from a import b`` yields ``a.b``, because ``b`` may be a module. ``import_module("a.b")`` counts too.
    """
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *(node.module.split(".") if node.module else ())])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "importlib.import_module", "__import__"):
            first = node.args[0] if node.args else None
            yield node.lineno, str(first.value) if isinstance(first, ast.Constant) else "<computed>"


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def is_in(file: Path, room: str) -> bool:
    return file.is_relative_to(ROOT / "loghook" / room) or file == ROOT / "loghook" / f"{room}.py"


def test_the_import_finder_finds_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "loghook" / "log" / "reader.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import loghook.capture.tap\n"
        "def f():\n"
        "    from loghook import capture\n"
        "    from ..capture import run\n"
        "    from .. import api\n"
        "    from . import format\n"
        "    importlib.import_module('loghook.api')\n"
    )
    assert [name for _, name in imports(file)] == [
        "loghook.capture.tap",
        "loghook.capture",
        "loghook.capture.run",
        "loghook.api",
        "loghook.log.format",
        "loghook.api",
    ]


def test_nothing_behind_the_log_imports_capture_or_the_door() -> None:
    broken = [
        f"{show(file)}:{line} imports {name}"
        for file in FILES
        for line, name in imports(file)
        if any(is_in(file, room) for room in BEHIND_THE_WALL)
        and (inside(name, "loghook.capture") or inside(name, "loghook.api") or public(name))
    ]
    assert not broken, "\n".join(broken)


def public(name: str) -> bool:
    """Whether only loghook/__init__.py gives a name (``from loghook import init``): it is then api's or capture's."""
    if name == "loghook":
        return True
    parts = name.split(".")
    if parts[0] != "loghook" or len(parts) != 2:
        return False
    room = ROOT / "loghook" / parts[1]
    return not (room.is_dir() or room.with_suffix(".py").exists())


def test_projections_import_nothing_of_loghook_but_errors() -> None:
    broken = [
        f"{show(file)}:{line} imports {name}"
        for file in FILES
        if is_in(file, "project")
        for line, name in imports(file)
        if inside(name, "loghook") and not (inside(name, "loghook.errors") or inside(name, "loghook.project"))
    ]
    assert not broken, "\n".join(broken)


def test_errors_import_nothing_of_loghook() -> None:
    assert not [name for _, name in imports(ROOT / "loghook" / "errors.py") if inside(name, "loghook")]


def test_the_log_knows_no_mathematics_to_its_right() -> None:
    right = ("loghook.factors", "loghook.influence", "loghook.evaluate", "loghook.valuation")
    broken = [
        f"{show(file)}:{line} imports {name}"
        for file in FILES
        if is_in(file, "log")
        for line, name in imports(file)
        if any(inside(name, room) for room in right)
    ]
    assert not broken, "\n".join(broken)


def test_no_pickle_and_no_code_from_data() -> None:
    broken = []
    for file in FILES:
        broken += [
            f"{show(file)}:{line} imports {name}"
            for line, name in imports(file)
            if any(inside(name, module) for module in FORBIDDEN_MODULES)
        ]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and called(node) in ("eval", "exec", "compile", "torch.load", "torch.save"):
                broken.append(f"{show(file)}:{node.lineno} calls {called(node)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                broken.append(f"{show(file)}:{node.value.lineno} allows pickle")
    assert not broken, "\n".join(broken)


def test_the_house_is_not_empty() -> None:
    """Guards the tests above: they must have looked at something."""
    assert {room for room in BEHIND_THE_WALL if any(is_in(file, room) for file in FILES)} >= {
        "log", "factors", "influence", "project",
    }  # fmt: skip


def test_every_public_name_and_method_says_what_it_does() -> None:
    silent = []
    for module in (loghook, loghook.evaluate):
        for name in module.__all__:
            thing = getattr(module, name)
            parts = {name: thing}
            if inspect.isclass(thing):
                parts |= {f"{name}.{part}": value for part, value in inspect.getmembers(thing) if part[0] != "_"}
            for part, value in parts.items():
                ours = getattr(getattr(value, "fget", value), "__module__", "") or ""
                if ours.startswith("loghook") and callable(getattr(value, "fget", value)) and not value.__doc__:
                    silent.append(f"{module.__name__}.{part}")
    assert not silent, "\n".join(silent)
