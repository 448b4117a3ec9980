"""Compiled kernels on disk, which are loaded only if we wrote them, and compilers that fail."""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pararnn import RNN, explain
from pararnn.cells import ParaGRUCell
from pararnn.kernels import cache
from pararnn.kernels.c import build as c_build
from pararnn.kernels.facts import facts_of, machine_of
from pararnn.kernels.triton import build as triton_build
from pararnn.layers import runner as of_layers
from pararnn.planning.plan import choose_backend
from pararnn.testing import assert_close, loop

SOURCE = "int answer(void) { return 42; }"
OTHER = "int answer(void) { return 13; }"


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """Nothing that is kept between processes, and every warning anew."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for function in (cache._private_folder, cache._warn_untrusted, of_layers._warn_slow):
        function.cache_clear()
    yield
    cache._private_folder.cache_clear()


def answer(source=SOURCE):
    return c_build.load(source, ["answer"]).answer()


def built(source=SOURCE):
    """The file of a library that no process has loaded yet."""
    return c_build._built(c_build.find_compiler(), source, "-fopenmp")


def replace_by(planted, library):
    """Put another library in the place of one, with its own checksum."""
    cache.keep(library, planted.read_bytes())


def make_foreign(folder, monkeypatch):
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    return folder


def make_link(folder, _):
    real = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(real)
    return folder


def make_writable(mode):
    def change(folder, _):
        folder.chmod(mode)
        return folder

    return change


UNTRUSTED = {
    "foreign": (make_foreign, "belongs to user .* folder of your own"),
    "link": (make_link, "is a link; set PARARNN_CACHE to the folder .*elsewhere"),
    "group": (make_writable(0o770), "can be written by others; run chmod go-w"),
    "others": (make_writable(0o707), "can be written by others; run chmod go-w"),
}


@pytest.mark.parametrize("kind", UNTRUSTED)
def test_a_folder_that_others_could_write_is_not_used(kind, fresh_cache, monkeypatch):
    change, words = UNTRUSTED[kind]
    replace_by(built(OTHER), built())
    before = sorted(p.name for p in fresh_cache.iterdir())
    change(fresh_cache, monkeypatch)
    with pytest.warns(UserWarning, match=words):
        assert answer() == 42
    assert sorted(p.name for p in fresh_cache.iterdir()) == before


def test_a_known_name_in_the_temporary_folder_is_not_trusted(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARARNN_CACHE", str(tmp_path / "file" / "below"))
    assert answer() == 42
    known = tmp_path / "tmp" / f"pararnn-{os.getuid()}"
    assert list(known.glob("*.so"))
    known.chmod(0o777)
    with pytest.warns(UserWarning, match="can be written by others"):
        assert answer(OTHER) == 13
    (private,) = set(known.parent.iterdir()) - {known}
    assert private.stat().st_mode & 0o777 == 0o700
    assert list(private.glob("*.so"))


def truncate(library):
    os.truncate(library, 5000)


def empty(library):
    os.truncate(library, 0)


def change_a_bit(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def take_another(library):
    other = built(OTHER)
    for name in (".so", ".sha256"):
        shutil.copy(other.with_suffix(name), library.with_suffix(name))


def lose_checksum(library):
    library.with_suffix(".sha256").unlink()


def let_others_write(library):
    replace_by(built(OTHER), library)
    library.chmod(0o666)


def link_to_another(library):
    replace_by(built(OTHER), library)
    library.symlink_to(library.rename(library.with_name("planted")))


def put_a_pipe(library):
    library.unlink()
    os.mkfifo(library)


DAMAGE = [
    truncate,
    empty,
    change_a_bit,
    take_another,
    lose_checksum,
    let_others_write,
    link_to_another,
    put_a_pipe,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_library_that_is_not_as_it_was_written_is_built_anew(damage, fresh_cache):
    library = built()
    good = library.read_bytes()
    damage(library)
    assert answer() == 42
    assert library.read_bytes() == good
    assert cache.is_kept(library)


def test_generated_triton_is_not_read_from_files(fresh_cache):
    source = "import triton\n\n\n@triton.jit\ndef kernel(x):\n    pass\n"
    name = triton_build.load(source).__name__
    del sys.modules[name]
    fresh_cache.mkdir(exist_ok=True)
    (fresh_cache / f"{name}.py").write_text("raise SystemExit('planted')")
    module = triton_build.load(source)
    assert module.kernel is not None
    assert triton_build.load(source) is module
    assert not list(fresh_cache.rglob("*.pyc"))


def test_threads_build_the_same_kernel(fresh_cache):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, [SOURCE] * 4)) == [42] * 4


def test_processes_build_the_same_kernel(fresh_cache):
    code = f"from pararnn.kernels.c.build import load; print(load({SOURCE!r}, ['answer']).answer())"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=100)[0] for p in running] == ["42\n"] * 2
    assert cache.is_kept(built())
    assert not [p for p in fresh_cache.iterdir() if p.suffix not in (".so", ".c", ".sha256")]


def test_a_private_folder_goes_with_its_process(tmp_path):
    environment = os.environ | {"PARARNN_CACHE": "/dev/null/x", "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp" / f"pararnn-{os.getuid()}").write_text("no folder")
    code = (
        "from pararnn.kernels.c import build as c_build\n"
        f"assert c_build.load({SOURCE!r}, ['answer']).answer() == 42\n"
        "print(c_build._built(c_build.find_compiler(), '', '-fopenmp').parent)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    private = Path(said.stdout.strip())
    assert private.parent == tmp_path / "tmp"
    assert not private.exists()


@pytest.mark.parametrize("name", ["-kernels", os.fsdecode(b"caf\xe9"), "a b'c"])
def test_names_of_the_cache_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache._absolute.cache_clear()
    monkeypatch.setenv("PARARNN_CACHE", name)
    assert answer() == 42
    monkeypatch.chdir(tmp_path / "tmp")  # the folder stays where it was
    assert answer(OTHER) == 13
    assert len(list((tmp_path / name).glob("*.so"))) == 2
    assert not list((tmp_path / "tmp").iterdir())


def test_an_empty_name_of_the_cache_folder_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "tmp")
    monkeypatch.setenv("PARARNN_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert answer() == 42
    assert list((tmp_path / ".cache" / "pararnn").glob("*.so"))
    assert not list((tmp_path / "tmp").iterdir())


def no_home(monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)


def home_that_is_not_there(monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")


@pytest.mark.parametrize("change", [no_home, home_that_is_not_there])
def test_without_a_home(change, tmp_path, monkeypatch):
    for name in ("PARARNN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    change(monkeypatch)
    assert answer() == 42
    assert list((tmp_path / "tmp" / f"pararnn-{os.getuid()}").glob("*.so"))
    assert not Path("/nonexistent").exists()


OUTPUT = 'while [ "$1" != -o ]; do shift; done\n'
COMPILERS = {  # name: (the script, what is said)
    "fails": ("echo 'the disk is on fire' >&2; exit 1", "status 1\nthe disk is on fire"),
    "prints no UTF-8": (r"printf 'fire \377\n'; exit 3", "status 3\nfire \ufffd"),
    "writes nothing": ("exit 0", "kernel.o wrote nothing"),
    "writes an empty file": (OUTPUT + ': > "$2"', "kernel.o wrote nothing"),
    "writes garbage": (OUTPUT + 'echo garbage > "$2"', "cannot be loaded"),
    "writes another library": (
        'cc "$@"; ' + OUTPUT + 'case "$2" in *.so) echo | cc -shared -xc - -o "$2";; esac',
        "cannot be loaded: it has no function forward",
    ),
    "hangs": ("sleep 1000", r"kernel.o did not end within 1 s"),
}


@pytest.fixture
def use_compiler(tmp_path, monkeypatch, fresh_cache):
    def use(script):
        file = tmp_path / "own cc"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("CC", f"'{file}'")
        monkeypatch.setattr(c_build, "_LIMIT_S", 1.0 if "sleep" in script else 60.0)
        return file

    return use


class New(ParaGRUCell):
    """Every one has a step of its own, for which this process has no kernels yet."""

    numbers = itertools.count(64)

    def __init__(self):
        super().__init__(3, 4)
        self.factor = next(self.numbers) / 128

    def forward(self, x, state):
        return super().forward(x, state) * self.factor


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", COMPILERS)
def test_auto_goes_on_without_a_compiler_that_fails(kind, compiled, use_compiler, capsys):
    script, words = COMPILERS[kind]
    use_compiler(script)
    cell = New()
    rnn = RNN(cell)
    layer = torch.compile(rnn, backend="aot_eager", fullgraph=True) if compiled else rnn
    x = torch.randn(2, 30, 3)
    with pytest.warns(UserWarning, match=words) as said:
        y, _ = layer(x)
    assert len(said) == 1
    assert_close("y", y, loop(cell, x, torch.zeros(2, 4))[0], rtol=1e-5)
    y.sum().backward()
    layer(x)  # another warning would be an error
    assert explain(rnn).plan.backend == "torch"
    assert "generated kernels are not possible" in capsys.readouterr().out
    RNN(cell)(x)


@pytest.mark.parametrize("kind", COMPILERS)
def test_c_says_what_a_compiler_said(kind, use_compiler):
    script, words = COMPILERS[kind]
    use_compiler(script)
    cell = New()
    rnn = RNN(cell, backend="c")
    x = torch.randn(2, 30, 3)
    with pytest.raises(c_build.CompilerError, match=words):
        rnn(x)
    use_compiler('exec cc "$@"')  # repaired
    assert_close("y", rnn(x)[0], loop(cell, x, torch.zeros(2, 4))[0], rtol=1e-5)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process in /proc")
def test_all_of_a_compiler_that_hangs_is_killed(tmp_path, use_compiler, monkeypatch):
    use_compiler(f"sleep 1000 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(c_build, "_LIMIT_S", 5.0)  # to have begun by then
    with pytest.raises(c_build.CompilerHangs):
        answer("int answer(void) { return 1; }")
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 30
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_compiler_that_cannot_be_started(use_compiler):
    use_compiler("").write_bytes(b"\0")
    with pytest.raises(c_build.CompilerError, match="own cc could not be started"):
        answer()


def test_quotes_without_an_end_in_the_name_of_a_compiler(monkeypatch, fresh_cache):
    monkeypatch.setenv("CC", "gcc '")
    assert answer() == 42


def test_garbage_is_not_kept_for_a_repaired_compiler(use_compiler):
    file = use_compiler(COMPILERS["writes garbage"][0])
    stamp = file.stat().st_mtime_ns
    with pytest.raises(c_build.CompilerError):
        answer()
    os.utime(use_compiler('exec cc "$@"'), ns=(stamp, stamp))
    assert answer() == 42


class BrokenDriver:
    """A driver of Triton on a machine without a compiler."""

    def get_current_target(self):
        raise RuntimeError("Failed to find C compiler.")


def test_triton_that_is_too_old_is_missing(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    triton_build.missing.cache_clear()
    try:
        words = triton_build.missing("cuda")
        assert "Triton 3.5.1 is too old for kernels on a GPU; install Triton 3.6" in words
    finally:
        triton_build.missing.cache_clear()


def test_triton_that_does_not_work_is_missing(monkeypatch):
    triton = pytest.importorskip("triton")
    if triton_build.too_old():
        pytest.skip("which is said first")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(triton.runtime.driver, "_active", BrokenDriver(), raising=False)
    gpu = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    triton_build.missing.cache_clear()
    try:
        words = triton_build.missing("cuda")
        assert "does not work with this GPU: RuntimeError: Failed to find C compiler" in words
        traced = RNN(ParaGRUCell(3, 4)).runner().traced
        known, machine = facts_of(traced.step), machine_of(torch.device("cuda"))
        choice = choose_backend("auto", known, machine)
        assert choice.name == "torch"
        assert "Failed to find C compiler" in choice.missing
        with pytest.raises(ValueError, match=r"backend='triton' cannot run .*Failed to find"):
            choose_backend("triton", known, machine)
    finally:
        triton_build.missing.cache_clear()
