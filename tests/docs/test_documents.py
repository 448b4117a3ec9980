"""README and docs tell the truth: their code runs, their links lead somewhere, versions agree."""

import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest

import pararnn
from pararnn.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CALL = re.compile(r"(?:^|&& |-m )pararnn(?:\.cli)? (.*)$")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")


def page_id(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    return BLOCK.findall(page.read_text())


def needs_a_run(block):
    return "runs/" in block


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=page_id)
def test_code_runs(page, capsys):
    scope = {"__name__": "page"}
    for block in blocks(page):
        if not needs_a_run(block):
            exec(compile(block, str(page), "exec"), scope)


def commands():
    """The lines of all pages that call `pararnn`, each once, without what the shell does."""
    found = {}
    for page in PAGES:
        shell = [block for language, block in FENCED.findall(page.read_text()) if not language]
        for block in shell:
            for line in block.replace("\\\n", " ").splitlines():
                for call in CALL.findall(line):
                    words = shlex.split(re.split(r"\s(?:>|&&|\|)\s", call)[0], comments=True)
                    found.setdefault(shlex.join(words), words)
    return found


class Accepted(BaseException):
    """The arguments were parsed, and all settings are as they may be."""


@pytest.mark.parametrize("call", commands())
def test_commands_are_accepted(call, monkeypatch, tmp_path):
    import tyro

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_cell.py").write_text("class Resonator: ...\nclass Oscillator: ...\n")

    real = tyro.cli

    def parsed(*args, **kwargs):
        real(*args, **kwargs)
        raise Accepted

    monkeypatch.setattr(tyro, "cli", parsed)
    *_, last = arguments = commands()[call]
    with pytest.raises(SystemExit if last == "--help" else Accepted) as ended:
        main(arguments)
    assert last != "--help" or ended.value.code == 0


def test_there_are_commands():
    assert len(commands()) > 30


def test_what_works_together_is_tested():
    rows = (ROOT / "docs/reference/works-together.md").read_text().splitlines()
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    assert sum(answer.startswith("yes") for _, answer, *_ in cells) > 40
    for what, answer, _, test in cells:
        if answer.startswith("yes"):
            file, _, name = test.strip("`").partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(), what


def test_figures_are_those_of_the_tables_of_the_results():
    for path, made in runpy.run_path(str(ROOT / "benchmarks/readme.py"))["pages"]().items():
        assert made == (ROOT / path).read_text(), "run benchmarks/readme.py"


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 120  # what one reads before trying it


def test_readme_has_code():
    assert len(blocks(ROOT / "README.md")) >= 4


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=page_id)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page_id(page)} links to {target}"


def test_versions_agree():
    project = (ROOT / "pyproject.toml").read_text()
    readme = (ROOT / "README.md").read_text()
    python = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    torch = re.search(r'"torch>=([\d.]+)"', project)[1]
    assert f"Python {python} or newer" in readme
    assert f"torch {torch} or newer" in readme
    assert "torch==" in (ROOT / "constraints.txt").read_text()
    assert f"\nversion: {pararnn.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {pararnn.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_the_oldest_and_newest_versions_that_are_named():
    project = (ROOT / "pyproject.toml").read_text()
    workflow = (ROOT / ".github/workflows/tests.yml").read_text()
    oldest = (ROOT / "constraints-oldest.txt").read_text()
    pythons = re.findall(r'Python :: (3\.\d+)"', project)
    assert re.findall(r'python: "(3\.\d+)"', workflow) == [pythons[0], "3.11", pythons[-1]]
    for name in ("torch", "triton", "numpy", "transformers", "datasets", "pytest"):
        floor = re.search(rf'"{name}>=([\d.]+)', project)[1]
        assert re.search(rf"^{name}=={re.escape(floor)}(\.\d+)*$", oldest, re.MULTILINE), name


def test_ci_runs_the_readmes_test_line():
    line = 'pip install -c constraints.txt -e ".[test]" && pytest'
    assert line in (ROOT / "README.md").read_text()
    run = (ROOT / ".ci/run").read_text()
    assert "pins=${CONSTRAINTS-constraints.txt}" in run
    assert line.replace("-c constraints.txt", '${pins:+-c "$pins"}') in run


def test_readme_shows_what_explain_prints(tmp_path):
    readme = (ROOT / "README.md").read_text()
    script = tmp_path / "leaky.py"
    script.write_text(blocks(ROOT / "README.md")[0])
    rnn = runpy.run_path(str(script))["rnn"]
    printed = str(pararnn.explain(rnn)).splitlines()
    assert "\n".join(printed[:4]) in readme


def test_docstring_examples():
    for info in pkgutil.walk_packages(pararnn.__path__, "pararnn."):
        if "__main__" not in info.name:
            assert doctest.testmod(importlib.import_module(info.name)).failed == 0


def test_guide_shows_what_explain_prints(tmp_path):
    guide = (ROOT / "docs/tutorial/own-cell.md").read_text()
    script = tmp_path / "oscillator.py"
    script.write_text(blocks(ROOT / "docs/tutorial/own-cell.md")[0])
    cell = runpy.run_path(str(script))["Oscillator"](6, 10)
    printed = str(pararnn.explain(pararnn.RNN(cell, backend="c"))).splitlines()
    for line in printed:
        if ".py:" not in line and not line.startswith(("    backend", "  source")):
            assert line in guide


def test_messages_in_the_guide_are_those_of_the_code():
    guide = (ROOT / "docs/reference/steps.md").read_text()
    table = guide[guide.index("| what | message says |") :].split("\n\n")[0]
    sources = [p.read_text() for p in (ROOT / "src/pararnn/tracing").glob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    code = code.replace("{self._called(written)}", "VALUE")
    for row in table.splitlines()[2:]:
        for message in re.findall(r"`([^`]+)`", row.split("|")[2]):
            if message != "forward":
                general = re.sub(r"(?<=writes into )(its state|self[.\w]+)", "VALUE", message)
                assert general in code, message
