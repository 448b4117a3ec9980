"""Every kind of source: what is a document, what is skipped, what is refused."""

import gzip
import json
import shutil
import sys

import pytest

from pararnn.lm.data.recipes import RECIPES, Recipe
from pararnn.lm.training import RunError

from .conftest import byte_texts, sentence

SENTENCES = [sentence(n) for n in range(30)]


def all_texts(data):
    train, validation = byte_texts(data)
    assert train
    assert validation
    return sorted(train + validation)


def test_folder(texts, make):
    (texts / "picture.png").write_bytes(b"\x89PNG\0")
    (texts / "latin.txt").write_bytes("Grüße".encode("latin1"))
    (texts / "empty.txt").touch()
    (texts / ".hidden.txt").write_text("hidden")
    data = make(texts)
    assert all_texts(data) == sorted(SENTENCES)
    assert json.loads((data.folder / "index.json").read_text())["num_skipped"] == 2


def test_single_file_is_split_at_a_line(tmp_path, make):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n}\n" for n in range(100)))
    (train,), (validation,) = byte_texts(make(path, held_out=0.1))
    assert train + validation == path.read_text()
    assert validation.startswith("line ")
    assert 50 < len(validation) <= 90
    (train,), (validation,) = byte_texts(make(path, name="more", held_out=0.9999))
    assert train == "line 0\n"


def test_two_files_are_documents(tmp_path, make):
    for name in "ab":
        (tmp_path / name).write_text(f"text {name}\nsecond line")
    train, validation = byte_texts(make(tmp_path / "a", tmp_path / "b"))
    assert (len(train), len(validation)) == (1, 1)


def test_json_lines_plain_and_compressed(lines, make):
    with lines.open("a") as file:
        file.write('\n  \n{"text": ""}\n{"text": "surrogate \\ud800"}\n{"text": "zero \\u0000"}')
    data = make(lines)
    assert all_texts(data) == sorted(SENTENCES)
    index = json.loads((data.folder / "index.json").read_text())
    assert index["num_skipped"] == 2
    compressed = lines.parent / "again" / "rows.jsonl.gz"
    compressed.parent.mkdir()
    with gzip.open(compressed, "wb") as file:
        file.write(lines.read_bytes())
    lines.unlink()
    assert make(compressed.parent, name="gz").sha256 == data.sha256


def test_other_text_field(tmp_path, make):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "one"}\n{"body": "two"}\n')
    assert all_texts(make(path, text_field="body")) == ["one", "two"]
    with pytest.raises(RunError, match=r"line 1 has no field 'text'; it has body.*--text-field"):
        make(path, name="other")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "is not JSON"),
        ('"text"', "is not a JSON object"),
        ('{"text": 7}', "holds 7 as 'text'; it must be a string"),
        ('{"text": null}', "holds null"),
        (b'{"text": "\xff"}', "is not JSON"),
    ],
)
def test_bad_line_is_named(line, message, lines, make):
    before = lines.read_bytes().splitlines(keepends=True)
    line = line if isinstance(line, bytes) else line.encode()
    lines.write_bytes(b"".join([*before[:17], line + b"\n", *before[17:]]))
    with pytest.raises(RunError, match=f"rows.jsonl line 18 {message}"):
        make(lines)


def test_damaged_compression_is_named(lines, make):
    path = lines.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress(lines.read_bytes())[:-20])
    with pytest.raises(RunError, match=r"cannot read .*rows.jsonl.gz after line"):
        make(path)


def test_dataset_of_a_folder(lines, make, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    content = lines.read_text().splitlines(keepends=True)
    (tmp_path / "set/a.jsonl").write_text("".join(content[:11]))
    (tmp_path / "set/b.jsonl").write_text("".join([*content[11:], '{"text": ""}\n']))
    assert all_texts(make(f"datasets:{tmp_path}/set")) == sorted(SENTENCES)
    with pytest.raises(RunError, match=r"row 0 of .* has no field 'body'; it has number, text"):
        make(f"datasets:{tmp_path}/set", name="other", text_field="body")
    with pytest.raises(RunError, match=r"row 0 of .* holds int as 'number'"):
        make(f"datasets:{tmp_path}/set", name="number", text_field="number")
    with pytest.raises(RunError, match=r"cannot load the dataset .*:nope"):
        make(f"datasets:{tmp_path}/set:nope", name="configuration")


def test_recipe_leaves_books_out(tmp_path, make, monkeypatch):
    pytest.importorskip("datasets")
    slimpajama = RECIPES["slimpajama-no-books"]
    assert slimpajama.dataset == "cerebras/SlimPajama-627B"
    (tmp_path / "set").mkdir()
    names = ["RedPajamaC4", "RedPajamaBook", "RedPajamaArXiv"]
    rows = [{"text": f"{n}", "meta": {"redpajama_set_name": names[n % 3]}} for n in range(12)]
    (tmp_path / "set/a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setitem(RECIPES, "small", Recipe(f"{tmp_path}/set", slimpajama.keep))
    assert all_texts(make("small")) == sorted(str(n) for n in range(12) if n % 3 != 1)
    with pytest.raises(RunError, match=r"no meta.redpajama_set_name"):
        slimpajama.keep({"text": "a"})


def test_missing_extra_is_named(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RunError, match=r'needs the package datasets.*pararnn\[train,data\]"'):
        make("datasets:wikitext")


def test_several_sources(texts, lines, make):
    assert all_texts(make(texts, lines)) == sorted(2 * SENTENCES)


def test_missing_source(tmp_path, make):
    with pytest.raises(
        RunError, match=r"no file or folder .*wikitext. Besides these, .*datasets:NAME, slim"
    ):
        make(tmp_path / "wikitext")


def test_named_file_must_be_text(texts, tmp_path, make):
    binary = tmp_path / "a.bin"
    binary.write_bytes(b"a\0b")
    with pytest.raises(RunError, match="binary file"):
        make(texts, binary)


@pytest.mark.parametrize("content", [{}, {"a.png": b"\0"}, {"a.txt": b""}])
def test_no_text(content, tmp_path, make):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("b.txt", *content):
        (folder / name).write_bytes(content.get(name, b""))
    with pytest.raises(RunError, match=r"no text in|binary"):
        make(folder)


def test_one_document_is_too_few(tmp_path, make):
    (tmp_path / "rows.jsonl").write_text('{"text": "only one"}\n')
    with pytest.raises(RunError, match=r"only one document in .*rows.jsonl; at least two"):
        make(tmp_path / "rows.jsonl")
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(RunError, match="has 1 byte; that is too little to split"):
        make(tmp_path / "text.txt", name="letter")


@pytest.mark.parametrize(
    ("text", "held_out"),
    [
        ("first\nsecond\nthird\n", "third\n"),
        ("short\n" + "long " * 20, "long " * 20),
        ("a single line ☃", "☃"),
        ("a single line ☃\n", "☃\n"),
    ],
)
def test_an_only_text_is_cut_at_a_line_or_a_character(text, held_out, tmp_path, make):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/one.txt").write_text(text)
    for number, source in enumerate(("texts/one.txt", "texts")):
        found = byte_texts(make(tmp_path / source, name=str(number), held_out=0.1))
        assert found == ([text.removesuffix(held_out)], [held_out])


def test_the_split_of_a_document_depends_on_its_name_alone(texts, make):
    _, held_out = byte_texts(make(texts, held_out=0.3))
    assert len(held_out) > 3
    fewer = texts.with_name("fewer")
    shutil.copytree(texts, fewer)
    gone = [path for path in sorted(fewer.rglob("*.txt"))[::2] if path.unlink() is None]
    (fewer / "new.txt").write_text("new")
    assert gone
    _, rest = byte_texts(make(fewer, name="fewer-tokens", held_out=0.3))
    left = {path.read_bytes().decode() for path in fewer.rglob("*.txt")} - {"new"}
    assert set(rest) - {"new"} == set(held_out) & left


def test_the_split_of_lines_does_not_depend_on_units(lines, make):
    assert byte_texts(make(lines)) == byte_texts(make(lines, name="b", unit_bytes=10**6))
