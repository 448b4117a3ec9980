"""The API reference names every public name, and nothing that does not exist."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import textwrap
from pathlib import Path

import pytest

import pararnn

from .test_documents import PAGES, blocks

ROOT = Path(__file__).parents[2]
PACKAGE = Path(pararnn.__file__).parent
REFERENCE = sorted((ROOT / "docs/reference").glob("*.md"))
DOCUMENTED = [
    name
    for page in REFERENCE
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]


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


def is_config(name):
    thing = find(name)
    return dataclasses.is_dataclass(thing) and name.endswith(("Config", "Arguments", ".Output"))


def is_nested(field):
    made = field.default_factory
    return dataclasses.is_dataclass(made)


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


def test_every_option_of_the_command_line_is_in_the_reference():
    found = []
    for file in (PACKAGE / "cli").glob("[!_]*.py"):
        module = f"pararnn.cli.{file.stem}"
        names = [n for n in vars(find(module)) if re.fullmatch(r"[A-Z]\w+Arguments", n)]
        found += [f"{module}.{n}" for n in names if n != "DataArguments"]  # which are two commands
    assert len(found) > 8
    assert [name for name in found if name not in DOCUMENTED] == []


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_object_of_the_reference_has_a_docstring(name):
    thing = find(name)
    assert isinstance(thing, dict) or inspect.getdoc(thing)


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if is_config(name)])
def test_every_setting_says_what_it_is(name):
    """Attribute docstrings are what the reference and `--help` show."""
    thing = find(name)
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    described = [
        field.target.id
        for field, text in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    ]
    own = [f.name for f in dataclasses.fields(thing) if f.name in thing.__annotations__]
    nested = [f.name for f in dataclasses.fields(thing) if is_nested(f)]
    assert [n for n in own if n not in described and n not in nested] == []


def test_no_name_is_in_the_reference_twice():
    assert len(set(DOCUMENTED)) == len(DOCUMENTED)
