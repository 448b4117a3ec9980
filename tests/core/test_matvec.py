"""Products with one vector that take in what computes it: compiled functions against float64."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)


from pararnn.kernels import matvec
from pararnn.kernels.matvec_fusion import FuseMatvecs
from pararnn.kernels.triton import device
from pararnn.planning.kernel_plans import plan_matvec
from pararnn.testing import assert_close

pytestmark = pytest.mark.filterwarnings("default")  # the compiler's own are errors to it

RTOL = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Counted(FuseMatvecs):
    """Counts the products of a graph, fused and left."""

    def __call__(self, graph):
        super().__call__(graph)
        names = [str(node.target) for node in graph.nodes]
        self.fused = names.count("pararnn.matvec.default")
        self.converted = [n for n in graph.nodes if "int8" in str(n.args) and n.users]
        products = [n for n in graph.nodes if str(n.target) == "pararnn.matvec.default"]
        leaves = [leaf for product in products for leaf in product.args[0]]
        self.computed = [n for n in leaves if n.args[0].op != "placeholder"]
        self.left = names.count("aten.mm.default") + names.count("aten.bmm.default")

    def uuid(self):
        return None


def residual_norm(x, other, weight, scale, w1, w2):
    """What is normed is wanted too."""
    x = scale * x + other
    y = F.rms_norm(x, x.shape[-1:], weight, 1e-5)
    return F.linear(y, w1), F.linear(y, w2), x


def gated(x, gate, w):
    return F.linear(F.silu(gate) * x, w)


def given(x, w):
    return F.linear(x, w)


def heads(window, u, taps, w):
    """A convolution over time, and a block of the matrix for every head."""
    inputs = torch.cat([window, u], 1)
    y = sum(inputs[:, k : k + 1] * taps[k] for k in range(len(taps)))
    count, _, inner = w.shape
    y = F.silu(y).view(1, count, inner).transpose(0, 1)
    return torch.bmm(y, w.mT).transpose(0, 1).flatten(), inputs[:, 1:]


def several_shapes(x, w1, w2):
    y = torch.tanh(x) + 0.5
    return F.linear(y, w1), F.linear(y, w2), y.exp()


def used_on_the_way(x, w):
    """A value that leads to another that the vector is computed from."""
    a = torch.sigmoid(x) * 2
    return F.linear(a * torch.cumsum(a, -1), w), a


def mean_used(x, w):
    mean = x.pow(2).mean(-1, keepdim=True)
    return F.linear(x * torch.rsqrt(mean + 1.0), w), mean


def many(x, *weights):
    y = x.relu()
    return [F.linear(y, w) for w in weights]


def cuts(a, b, w):
    joined = torch.cat([a, b], 1)
    late = joined[:, 1:]
    return F.linear(late[:, -1:], w), joined[:, ::2], joined[:, 2:4], late[:, ::2][:, 1:]


CASES = {
    "residual_norm": (residual_norm, [(1, 1, 48)] * 2 + [(48,)] * 2 + [(37, 48)] * 2, 1),
    "gated": (gated, [(1, 88), (1, 88), (21, 88)], 1),
    "given": (given, [(1, 64), (5, 64)], 1),
    "large": (given, [(1, 16384), (3, 16384)], 1),
    "heads": (heads, [(1, 3, 96), (1, 1, 96), (4, 96), (3, 20, 32)], 1),
    "several_shapes": (several_shapes, [(1, 1, 40), (9, 40), (11, 40)], 2),
    "used_on_the_way": (used_on_the_way, [(1, 40), (9, 40)], 1),
    "mean_used": (mean_used, [(1, 1, 40), (9, 40)], 1),
    "cuts": (cuts, [(1, 3, 40), (1, 2, 40), (9, 40)], 1),
    "many": (many, [(1, 33)] + [(7, 33)] * 11, 2),
}


def run(function, arguments):
    """The results of a compiled function, and the pass."""
    fusion = Counted()
    options = {"post_grad_custom_post_pass": fusion}
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    return compiled(*arguments), fusion


def compare(function, arguments, rtol):
    actual, fusion = run(function, arguments)
    expected = function(*(a.double().cpu() for a in arguments))
    if isinstance(expected, torch.Tensor):
        actual, expected = [actual], [expected]
    for index, (ours, exact) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == exact.shape
        assert_close(f"result {index}", ours.double().cpu(), exact, rtol=rtol)
    return fusion


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case, dtype):
    function, shapes, products = CASES[case]
    arguments = [torch.randn(shape).to(dtype) for shape in shapes]
    with torch.no_grad():
        fusion = compare(function, arguments, RTOL[dtype])
    assert (fusion.fused, fusion.left) == (products, 0)


def text_heads(window, u, taps, w):
    """The same as `heads` for several texts, whose vectors lie head by head."""
    inputs = torch.cat([window, u], 1)
    y = sum(inputs[:, k : k + 1] * taps[k] for k in range(len(taps)))
    count, _, inner = w.shape
    y = F.silu(y).view(-1, count, inner).transpose(0, 1)
    return torch.bmm(y, w.mT).transpose(0, 1).flatten(1), inputs[:, 1:]


def slots(x, bias, w):
    """What a cell makes of its drives: a product per head, its slots apart, gates and a sum."""
    count, rows, inner = w.shape
    drives = torch.bmm(x.view(-1, count, inner).transpose(0, 1), w.mT) * 0.1
    drives = drives.view(count, -1, 3, rows // 3).permute(1, 2, 0, 3).contiguous()
    z, r, c = (d.flatten(1) for d in drives.unbind(1))
    h = torch.sigmoid(z + bias[0]) * torch.tanh(r * bias[1] + c)
    return F.linear(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5), bias), h


def apart(x, w):
    """What is not regular is computed outside: every third entry of two tensors."""
    return F.linear(torch.cat([x[:, ::3], x[:, 1::3]], 1), w)


def number_of_texts(x, factor, other, w):
    """One number for every text, and one vector for all."""
    return F.linear(x * factor + other, w)


SEVERAL = {
    "residual_norm": (residual_norm, [(0, 1, 48)] * 2 + [(48,)] * 2 + [(37, 48)] * 2, 1),
    "gated": (gated, [(0, 88), (0, 88), (21, 88)], 1),
    "given": (given, [(0, 64), (5, 64)], 1),
    "long": (gated, [(0, 2300), (0, 2300), (19, 2300)], 1),
    "text_heads": (text_heads, [(0, 3, 96), (0, 1, 96), (4, 96), (3, 20, 32)], 1),
    "slots": (slots, [(0, 96), (40, 96), (3, 96, 32)], 2),
    "apart": (apart, [(0, 72), (9, 48)], 1),
    "mean_used": (mean_used, [(0, 1, 40), (9, 40)], 1),
    "many": (many, [(0, 33)] + [(7, 33)] * 11, 2),
    "number_of_texts": (number_of_texts, [(0, 40), (0, 1), (40,), (9, 40)], 1),
}


@pytest.mark.parametrize(
    ("texts", "dtype"),
    [(1, torch.float32), (2, torch.bfloat16), (2, torch.float16), (2, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("case", SEVERAL)
def test_several_texts_equal_float64(case, texts, dtype):
    function, shapes, products = SEVERAL[case]
    arguments = [torch.randn([n or texts for n in shape]).to(dtype) for shape in shapes]
    with torch.no_grad():
        fusion = compare(function, arguments, RTOL[dtype])
    assert (fusion.fused, fusion.left) == (products, 0)


@pytest.mark.parametrize("texts", [1, 2])
def test_weights_of_bytes_are_read_as_they_are(texts):
    """Converted within the kernel; their scales are taken in by what follows."""

    def function(x, w, scale, other):
        y = F.linear(x, w.to(x.dtype)) * scale
        return F.linear(F.silu(y).to(x.dtype), other)

    x = torch.randn(texts, 48).bfloat16()
    w = torch.randint(-127, 128, (64, 48), dtype=torch.int8)
    scale, other = torch.rand(64) / 100, torch.randn(9, 64).bfloat16()
    with torch.no_grad():
        fusion = compare(function, [x, w, scale, other], RTOL[torch.bfloat16])
    assert (fusion.fused, fusion.left) == (2, 0)
    assert not fusion.converted


@pytest.mark.parametrize("texts", [1, 2])
def test_a_scaled_entry_of_a_window_is_taken_in(texts):
    """A convolution takes its newest entry as a part that is all."""

    def function(window, x, scale, taps, w):
        newest = (x * scale).to(w.dtype).unsqueeze(1)
        inputs = torch.cat([window, newest], 1)
        y = sum(inputs[:, k : k + 1] * taps[k] for k in range(len(taps)))
        return F.linear(F.silu(y), w), inputs[:, -1:]

    shapes = [(texts, 3, 96), (texts, 96), (96,), (4, 96), (20, 96)]
    arguments = [torch.randn(shape).bfloat16() for shape in shapes]
    arguments[2] = arguments[2].float()
    with torch.no_grad():
        fusion = compare(function, arguments, RTOL[torch.bfloat16])
    assert (fusion.fused, fusion.left) == (1, 0)
    assert not fusion.computed


@pytest.mark.parametrize("texts", [1, 2])
def test_a_row_of_a_table_is_read_where_it_is(texts):
    """The embedding of a token; its entries go to heads, and on in what follows."""

    def function(tokens, table, weight, w, other):
        x = F.embedding(tokens, table)
        y = torch.bmm(F.silu(x).view(-1, len(w), w.shape[-1]).transpose(0, 1), w.mT)
        return y, F.linear(F.rms_norm(x, x.shape[-1:], weight, 1e-5), other)

    tokens = torch.tensor([[3], [0]])[:texts]
    shapes = [(5, 96), (96,), (3, 20, 32), (9, 96)]
    arguments = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        actual, fusion = run(function, [tokens, *arguments])
        expected = function(tokens, *(a.double() for a in arguments))
    for index, (ours, exact) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"result {index}", ours.double(), exact, rtol=2e-6)
    assert (fusion.fused, fusion.left) == (2, 0)
    assert not fusion.computed


@pytest.mark.parametrize(
    "shapes", [[(3, 64), (5, 64)], [(9, 64), (5, 64)], [(1, 8), (5, 8)], [(1, 16400), (2, 16400)]]
)
def test_what_does_not_fit_is_left(shapes):
    """More rows than two, a short vector and one too long for a program."""
    with torch.no_grad():
        fusion = compare(given, [torch.randn(shape) for shape in shapes], 2e-6)
    assert fusion.fused == 0


def test_double_is_left():
    with torch.no_grad():
        fusion = compare(given, [torch.randn(1, 64).double(), torch.randn(5, 64).double()], 1e-12)
    assert fusion.fused == 0


def test_products_of_results_are_left():
    """Only matrices that are arguments lie as they must."""
    arguments = [torch.randn(1, 32), torch.randn(5, 32)]
    with torch.no_grad():
        fusion = compare(lambda x, w: F.linear(x, w * 2), arguments, 2e-6)
    assert fusion.fused == 0


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("inner", [17, 512, 2048, 5632, 16384])
@pytest.mark.parametrize("rows", [1, 333, 2048, 50432])
def test_launches_have_all_rows_and_fit(rows, inner, heads):
    for itemsize, processors in itertools.product((2, 4), (1, 132)):
        operations = 10 if rows % 2 else 50
        launch = plan_matvec(rows, 2, heads, inner, itemsize, processors, operations)
        assert launch.block >= inner
        assert launch.rows * launch.block * itemsize <= 128 * 32 * launch.warps
        tiles_of_a_thread = launch.ahead * launch.rows * launch.block * itemsize / 32 / launch.warps
        assert launch.ahead == 1 or tiles_of_a_thread <= 192
        tiles = -(-rows // launch.rows) * 2
        assert 1 <= launch.programs <= tiles
        assert launch.group <= -(-tiles // launch.programs)
        assert launch.registers * 32 * launch.warps <= 2**16


@pytest.mark.parametrize(("rows", "count"), [(45, 1), (23, 2), (31, 2), (15, 3)])
def test_sums_of_two_tiles(rows, count):
    """Tiles of one matrix and of two, some without a partner or with fewer rows."""
    there = device.processors(torch.get_default_device())
    rows *= there
    assert plan_matvec(rows, count, 1, 1000, 2, there).group == 2
    arguments = [torch.randn(1, 1000), *(torch.randn(rows, 1000) for _ in range(count))]
    with torch.no_grad():
        compare(many, [a.bfloat16() for a in arguments], RTOL[torch.bfloat16])


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize(("ahead", "group"), [(2, 1), (2, 2), (3, 2), (1, 2)])
def test_tiles_on_their_way(ahead, group, texts, monkeypatch):
    """All of a program or some, whose sums are taken together or not, of one text and of two."""

    def plan(*sizes):
        launch = plan_matvec(*sizes)
        programs = -(-2 * -(-45 // launch.rows) // 3)
        return replace(launch, programs=programs, tiles=3, ahead=ahead, group=group)

    monkeypatch.setattr(matvec, "plan_matvec", plan)
    arguments = [torch.randn(texts, 300), *(torch.randn(45, 300) for _ in range(2))]
    with torch.no_grad():
        compare(many, [a.bfloat16() for a in arguments], RTOL[torch.bfloat16])


@pytest.mark.parametrize(("operations", "texts"), [(10, 1), (50, 1), (50, 2)])
def test_few_tiles_leave_room_for_the_next_product(operations, texts):
    """On every multiprocessor, for a program of its first weights or for one of half as many."""
    launch = plan_matvec(2048, 1, 1, 2048, 2, 132, operations, texts)
    programs = -(-launch.programs // 132)
    room = 2**16 - programs * launch.registers * 32 * launch.warps
    assert launch.tiles <= 4
    assert room >= (2**14 if operations == 50 else 2**13)


def test_what_was_not_timed_has_all_registers():
    """Other weights than of two bytes, many tiles, and much of a costly vector in a thread."""
    for sizes in (2048, 2, 1, 2048, 1), (2048, 2, 1, 2048, 4), (50432, 1, 1, 2048, 2):
        assert plan_matvec(*sizes, 132, 10).registers == 128
    assert plan_matvec(2048, 1, 1, 4096, 2, 132, 50).registers == 128
    assert plan_matvec(2048, 2, 1, 2048, 1, 132, 10).group == 1


@pytest.mark.parametrize(("dtype", "inner"), [(torch.bfloat16, 47), (torch.int8, 46)], ids=str)
def test_weights_that_are_no_words(dtype, inner):
    """A row that is no number of words, and weights that start within one."""
    x = torch.randn(1, inner).bfloat16()
    whole = torch.randint(-127, 128, (9 * inner + 1,)).to(dtype)
    for start in (0, 1):
        w = whole[start : start + 9 * inner].view(9, inner)
        with torch.no_grad():
            compare(lambda x, w: F.linear(x, w.to(x.dtype)), [x, w], RTOL[torch.bfloat16])


def test_weights_that_start_within_a_word():
    """Rows of whole words, which begin one number late."""
    x, whole = torch.randn(1, 48).bfloat16(), torch.randn(9 * 48 + 1).bfloat16()
    with torch.no_grad():
        compare(given, [x, whole[1:].view(9, 48)], RTOL[torch.bfloat16])


@pytest.mark.parametrize(
    "text",
    [
        "import os",
        '{"leaves": [[0, 0, 2, 2]], "nodes": [["drive", 1]], "roots": [[0]]}',
        '{"leaves": [[0, 0, 2, 2]], "nodes": [["__import__", 1]], "roots": [[0]]}',
        '{"leaves": [["os", 0, 2, 2]], "nodes": [["drive", 0]], "roots": [[0]]}',
    ],
)
def test_a_foreign_text_runs_nothing(text):
    with pytest.raises(ValueError, match=r"vector|among|operation|Expecting|invalid literal"):
        torch.ops.pararnn.matvec([torch.ones(2)], [torch.ones(1, 3, 2)], [], 1, text)
