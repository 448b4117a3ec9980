"""The API reference names every public name, and nothing that does not exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import pararnn

from .test_documents import PAGES, blocks

ROOT = Path(__file__).parents[2]
PACKAGE = Path(pararnn.__file__).parent
API = ROOT / "docs/reference/api.md"
DOCUMENTED = re.findall(r"^::: ([\w.]+)$", API.read_text(), re.MULTILINE)


def public_names():
    """What the packages hand on: `from module import name as name`."""
    for file in sorted([*PACKAGE.rglob("__init__.py"), *PACKAGE.rglob("_public.py")]):
        package = ".".join(["pararnn", *file.parent.relative_to(PACKAGE).parts])
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                for name in node.names:
                    if name.asname == name.name and not name.name.startswith("_"):
                        yield f"{package}.{name.name}"


def find(name):
    """The object of a dotted name: a module, or what is found in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(find(module), attribute)


def is_module(name):
    return isinstance(find(name), type(pararnn))


def imported_by(code):
    """Names of the package that a program imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "pararnn":
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_every_name_that_the_docs_and_examples_import_is_in_the_reference():
    code = [block for page in PAGES for block in blocks(page)]
    code += [example.read_text() for example in (ROOT / "examples").glob("*.py")]
    names = {name for program in code for name in imported_by(program)}
    assert len(names) > 5
    assert [name for name in names if not is_module(name) and name not in DOCUMENTED] == []


def test_every_public_name_is_in_the_reference():
    public = [name for name in public_names() if not is_module(name)]
    assert len(public) > 50
    assert [name for name in public if name not in DOCUMENTED] == []


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_name_in_the_reference_exists(name):
    assert find(name) is not None


def test_no_name_is_in_the_reference_twice():
    assert len(set(DOCUMENTED)) == len(DOCUMENTED)
