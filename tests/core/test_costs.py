"""Measured constants are fields of `Costs`, each with what it was measured by, and nowhere else."""

import ast
import itertools
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

import pararnn
from pararnn.planning import costs, rows_plan, triton_plan
from pararnn.planning.costs import COSTS, Costs
from pararnn.planning.kernel_plans import plan_matvec, steps_of_graphs

ROOT = Path(pararnn.__file__).parent
ROOMS = ("planning", "solvers", "kernels", "layers", "lm/decoding")
NO_COSTS = {
    # numbers that decide about values, or about what counts as equal
    "planning/settings.py": {"_DEFAULT_TOLERANCE"},
    "solvers/shooting.py": {"SMALL"},
    "planning/plan.py": {"_TF32"},
    "kernels/lowering.py": {"_GELU_CUBIC", "_GELU_SCALE", "_SIXTH"},
    "lm/decoding/decoder.py": {"_LEAST_NOISE"},
    "lm/decoding/int8.py": {"_LARGEST"},
    # sizes that hardware or Triton demands
    "planning/triton_plan.py": {"_WARP"},
    "planning/kernel_plans.py": {"TILE"},
    "kernels/c/mixing.py": {"_VECTOR_BYTES", "_KINDS"},  # the latter are names
    "layers/xlstm.py": {"_COMPONENTS", "_GATES"},  # of its state and step
    "kernels/triton/build.py": {"OLDEST", "_PARSES_IN_THREADS", "_MOST_FORMS"},  # versions, a bound
    # bounds of what is kept
    "kernels/facts.py": {"_MOST_PLANS"},
    "kernels/graphs.py": {"_GRAPHS", "_UNUSED", "_FORMS"},
    "kernels/pointwise.py": {"_FORMS"},
    "layers/traces.py": {"_MOST"},
    "layers/scan.py": {"_MOST_KNOWN", "_MOST_KEPT"},
    # a version and a bound of what is kept
    "kernels/registry.py": {"_VERSION", "_READ"},
    # how generated text looks, and when a compiler counts as stuck
    "kernels/printing.py": {"_LONGEST"},
    "kernels/c/build.py": {"_LIMIT_S"},
    # names of numbers
    "kernels/triton/wide.py": {"SUM", "MAX", "MIN"},
    "kernels/triton/spread.py": {"OWN", "REPEATED", "SENT"},
    "kernels/spread.py": {"OWN", "REPEATED", "SENT"},
    "kernels/triton/sweeps.py": {"_KINDS"},
    "solvers/report.py": {"SEQUENTIAL", "CONVERGED", "COMPLETED"},
    # sizes of what a cell is tried with
    "layers/sizes.py": {"_MOST_COMPONENTS", "_TRIAL_ROWS"},
}


def numbers(text):
    """Names in capitals that a module gives numbers to, alone or in tuples, lists and mappings."""
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        inside = list(ast.walk(node.value or node.target))
        keys = {key for n in inside if isinstance(n, ast.Dict) for key in n.keys}
        constants = [n.value for n in inside if isinstance(n, ast.Constant) and n not in keys]
        if any(isinstance(n, ast.Lambda) for n in inside) or not constants:
            continue
        if all(type(c) in (int, float) for c in constants):
            yield from (n for n in names if re.fullmatch("_?[A-Z][A-Z0-9_]*", n))


def test_no_constant_decides_outside():
    found = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            found[path.relative_to(ROOT).as_posix()] = set(numbers(path.read_text()))
    del found["planning/costs.py"]
    assert {path: names for path, names in found.items() if names} == NO_COSTS


def names_in(path):
    """Names that a file of the library imports, and those that it calls."""
    tree = list(ast.walk(ast.parse(path.read_text())))
    imported = {a.name for n in tree if isinstance(n, ast.ImportFrom) for a in n.names}
    return imported, {ast.unparse(n.func) for n in tree if isinstance(n, ast.Call)}


def test_only_the_planner_decides():
    """Solvers, paths and layers follow a plan, or ask for what depends on sizes on the way."""
    imported, called = {}, {}
    for path in (p for room in ROOMS for p in (ROOT / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(("planning/", "lm/")):
            imported[name], called[name] = names_in(path)
    who = lambda name, of: {n for n, names in of.items() if name in names}  # noqa: E731
    assert who("decide", imported) == who("decide", called) == {"kernels/facts.py"}
    for name in ("plan_launch", "plan_rows", "prefers_cell", "free_rows", "steps_at_once"):
        assert not who(name, imported), name
    assert who("COSTS", imported) == {  # numbers of a kernel, whatever the call
        "kernels/c/source.py",
        "kernels/graphs.py",
        "kernels/matvec_fusion.py",
        "kernels/moving.py",
        "kernels/pointwise.py",
    }


def test_constants_are_found():
    text = "A = 1 << 4; _B: int = 2; C, D = range(2); E = {'x': (3, 4)}; _F = 2.0**-1"
    others = "G = 'g'; h = 1; I = {'x': lambda y: 2 * y}; J = (1, 'j'); K: int"
    assert list(numbers(f"{text}; {others}")) == ["A", "_B", "C", "D", "E", "_F"]


def test_every_cost_says_where_it_was_measured():
    """And the pages and benchmarks that it names are there."""
    body = ast.parse(Path(costs.__file__).read_text()).body
    (body,) = (node.body for node in body if isinstance(node, ast.ClassDef))
    told = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr), field.target.id
            told[field.target.id] = " ".join(text.value.value.split())
    assert list(told) == [field.name for field in fields(Costs)]
    for name, text in told.items():
        pages = re.findall(r"(?:docs|benchmarks)/[\w/-]+\.\w+", text)
        assert pages or "Estimate" in text or "by count" in text, name
        for page in pages:
            assert (Path(__file__).parents[2] / page).exists(), f"{name}: {page}"


@pytest.mark.parametrize("worth", [1.0, 1e9])
def test_choices_follow_their_costs(worth):
    chosen = rows_plan.plan_rows(64, 30.0, 1, 4096, replace(COSTS, worth=worth))
    assert isinstance(chosen, pararnn.Sequential) == (worth > 1)


def test_pieces_and_blocks_follow_their_costs():
    assert rows_plan.steps_at_once(4, 64, "cpu") == COSTS.piece // 256
    assert rows_plan.steps_at_once(4, 64, "cuda") == COSTS.piece_on_gpu // 256
    assert rows_plan.steps_at_once(1 << 20, 64, "cpu") == COSTS.shortest_piece
    assert rows_plan.rows_at_once(10**6, 64, "cpu") == COSTS.cached_block // 64
    assert rows_plan.rows_at_once(10**6, 1 << 20, "cpu") == 1
    assert rows_plan.rows_at_once(10**6, 64, "cuda") == 10**6
    few = replace(COSTS, graph_steps=4)
    assert steps_of_graphs(3, 12, few) == [(3, 7), (7, 11), (11, 12)]
    assert steps_of_graphs(0, 4, few) == [(0, 4)]


def test_launches_follow_their_costs():
    work = triton_plan.Work(3, 2, 39)
    whole = replace(COSTS, enough_programs=(0.0, 0.0))
    assert triton_plan.plan_launch(1, 4096, 64, None, work, 4e-3, 132, False).chunks > 1
    assert triton_plan.plan_launch(1, 4096, 64, None, work, 4e-3, 132, False, whole).chunks == 1
    few = replace(COSTS, matvec_threads=COSTS.matvec_threads // 2)
    wide = (4096, 1, 1, 1024, 2, 132)
    assert plan_matvec(*wide, costs=few).programs < plan_matvec(*wide).programs
