"""Nothing is left out silently, and rows are never read as text with their markup."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import sys

import pytest

from pararnn.cli import main
from pararnn.lm.data import PrepareConfig, open_tokens, prepare
from pararnn.lm.data.reading import open_content
from pararnn.lm.training import RunError

from .conftest import byte_texts, sentence

SENTENCES = [sentence(n) for n in range(30)]
ROWS = [{"text": text} for text in SENTENCES]


def zstd(content):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def all_texts(data):
    train, validation = byte_texts(data)
    return sorted(train + validation)


def reasons(data):
    return {reason: entry["count"] for reason, entry in data.skipped.reasons.items()}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["lines", "list", "texts"])
def test_compressed_sources(kind, suffix, tmp_path, make):
    folder = tmp_path / "source"
    folder.mkdir()
    compress = COMPRESS[suffix]
    if kind == "texts":
        for number, text in enumerate(SENTENCES):
            (folder / f"{number}.txt{suffix}").write_bytes(compress(text.encode()))
    else:
        content = lines_of(ROWS) if kind == "lines" else json.dumps(ROWS).encode()
        parts = compress(content[:100]) + compress(content[100:])  # as parallel compressors do
        (folder / f"rows.{'jsonl' if kind == 'lines' else 'json'}{suffix}").write_bytes(parts)
    data = make(folder, units_per_shard=2)
    assert all_texts(data) == sorted(SENTENCES)
    assert not data.skipped.reasons


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.JSONL", lines_of(ROWS)),
        ("rows.ndjson", lines_of(ROWS)),
        ("rows.json", lines_of(ROWS)),
        ("rows.Json.GZ", gzip.compress(lines_of(ROWS))),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("rows.json", b"\xef\xbb\xbf" + lines_of(ROWS)),
        ("rows.jsonl", b"\xef\xbb\xbf" + lines_of(ROWS).replace(b"\n", b"\r\n")),
    ],
)
def test_rows_are_read_as_rows(name, content, tmp_path, make):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / name).write_bytes(content)
    assert all_texts(make(folder)) == sorted(SENTENCES)
    assert all_texts(make(folder / name, name="named")) == sorted(SENTENCES)


def test_one_row_in_a_file_is_a_document(tmp_path, make):
    for number, row in enumerate(ROWS):
        (tmp_path / f"{number}.json").write_text(json.dumps(row, indent=number % 2 or None))
    names = [tmp_path / f"{number}.json" for number in range(30)]
    assert all_texts(make(*names)) == sorted(SENTENCES)


def test_a_list_is_continued_at_its_row(tmp_path, make, monkeypatch):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    whole = make(tmp_path / "rows.json", name="whole", units_per_shard=2)
    calls = []

    def stop(merger, paths):
        calls.append(paths)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pararnn.lm.data.units.Merger.merge", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "rows.json", units_per_shard=2)
    again = make(tmp_path / "rows.json", units_per_shard=2)
    assert calls
    assert again.sha256 == whole.sha256


@pytest.mark.parametrize(
    ("name", "content", "message", "reason"),
    [
        ("a.zip", b"PK", r"a.zip is an archive.*unpack it", "archive or compression that is not"),
        ("a.tar.gz", b"", r"a.tar.gz is an archive", "archive or compression that is not read"),
        ("a.csv", b"text\nhere", r"a.csv is a table, which is not read", "table that is"),
        ("a.Parquet", b"PAR1", r"a.Parquet is a table.*datasets:FOLDER", "table that is not read"),
        ("a.json", b'{"name": 1}', 'holds no row with a field "text"', 'JSON without a field "te'),
        (
            "a.json",
            b'{"a": {"text": 1}}',
            'holds no row with a field "text"',
            "JSON without a field",
        ),
        ("a.json", b"// not JSON", 'holds no row with a field "text"', "JSON without a field"),
        ("a.jsonl", b'{"name": 1}\n' * 99, "has no field 'text'; it has name", "JSON without a fi"),
        ("a.json", b'{"name": 1}\n{}', "has no field 'text'; it has name", "JSON without a field"),
        ("a.json", b"[]", 'holds no row with a field "text"', 'JSON without a field "text"'),
        ("a.txt", "Grüße".encode("utf-16"), "is UTF-16 text; convert it", "not UTF-8"),
        ("a.txt", b"a\0", "is a binary file", "binary"),
    ],
)
def test_other_files_are_refused_by_name_and_counted_in_a_folder(
    name, content, message, reason, texts, make, tmp_path
):
    (texts / name).write_bytes(content)
    data = make(texts)
    assert all_texts(data) == sorted(SENTENCES)
    ((found, entry),) = data.skipped.reasons.items()
    assert found.startswith(reason)
    assert entry == {"count": 1, "first": [str(texts / name)]}
    with pytest.raises(RunError, match=message):
        make(tmp_path / "texts/0.txt", texts / name, name="named")


@pytest.mark.parametrize(
    "content",
    [
        lines_of(ROWS),
        json.dumps(ROWS).encode(),
        json.dumps(ROWS[0], indent=1).encode(),
        b"  " + gzip.compress(lines_of(ROWS)),
    ],
)
def test_rows_under_another_name_are_no_text(content, texts, make, tmp_path):
    path = texts / "part-0"
    path.write_bytes(content)
    if content.startswith(b"  "):  # compressed
        path = path.rename(texts / "part-0.gz")
        path.write_bytes(content[2:])
    with pytest.raises(RunError, match=r"part-0.* looks like rows of JSON.*--on-error skip"):
        make(texts)
    with pytest.raises(RunError, match=r"part-0.* looks like rows of JSON with a field 'text'"):
        make(path, name="alone")
    data = make(texts, name="skip", on_error="skip")
    assert reasons(data) == {"rows under the name of a text": 1}
    assert all_texts(data) == sorted(SENTENCES)


def test_on_error_skip_leaves_broken_lines_out(lines, make, tmp_path, capsys):
    good = lines.read_bytes().splitlines(keepends=True)
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    bad = [b'{"text": "cut\n', b'{"text": null}\n', b'{"text": "\xff"}\n', b"[1]\n", deep, b"{}\n"]
    lines.write_bytes(b"".join([*good[:10], *bad, *good[10:]]))
    with pytest.raises(RunError, match=r"line 11 is not JSON .*leave out such lines: .*--on-error"):
        make(lines)
    first = make(lines, on_error="skip")  # goes on in the same folder
    assert all_texts(first) == sorted(SENTENCES)
    entry = {"count": 6, "first": [f"{lines} line {n}" for n in range(11, 16)]}
    assert first.skipped.reasons == {"line without a text that can be read": entry}
    whole = make(lines, on_error="skip", name="two")
    assert whole.skipped.reasons == first.skipped.reasons
    assert whole.sha256 == first.sha256
    capsys.readouterr()
    command = ["data", "prepare", str(lines), "--out", str(tmp_path / "three"), "--workers", "1"]
    assert main([*command, "--on-error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert f"skipped: line without a text that can be read: 6 ({lines} line 11, " in printed
    assert f"{lines} line 15 and 1 more)" in printed
    assert json.loads((tmp_path / "three/index.json").read_text())["num_skipped"] == 6


def test_deep_lines_are_a_message(lines, make):
    lines.write_bytes(b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n" + lines.read_bytes())
    with pytest.raises(RunError, match=r"rows.jsonl line 1 is nested too deeply; correct or"):
        make(lines)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_cut_file_keeps_what_can_be_read(suffix, texts, make):
    path = texts / f"rows.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](lines_of(ROWS[:5]) * 400)[:-9])
    with pytest.raises(RunError, match=r"cannot read .*after line \d+: .*damaged or cut off.*skip"):
        make(texts, unit_bytes=10**6)
    data = make(texts, unit_bytes=10**6, on_error="skip")
    assert data.skipped.reasons == {"damaged compression": {"count": 1, "first": [str(path)]}}
    assert set(SENTENCES) <= set(all_texts(data))
    path.write_bytes(b"")
    with pytest.raises(RunError, match=r"cannot read .*: it has the name of a compressed"):
        make(path, name="empty")


def test_a_damaged_list_is_refused(texts, make):
    (texts / "rows.json").write_text(json.dumps(ROWS)[:-30])
    with pytest.raises(RunError, match=r"rows.json is neither a list of rows in JSON nor a row in"):
        make(texts)
    assert reasons(make(texts, on_error="skip")) == {"damaged JSON": 1}


def test_a_folder_without_texts_says_what_it_holds(tmp_path, make):
    (tmp_path / "source").mkdir()
    for name in ("a.zip", "b.txt", "c.dat"):
        (tmp_path / "source" / name).write_bytes(b"\0")
    with pytest.raises(
        RunError, match=r"there is no text in .*Skipped: archive .*a.zip\); binary: 2"
    ):
        make(tmp_path / "source")


def test_zstd_without_its_package(texts, make, monkeypatch):
    (texts / "rows.jsonl.zst").write_bytes(zstd(lines_of(ROWS)))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(RunError, match=r"zst needs the package zstandard.*--on-error skip"):
        make(texts)
    (reason,) = make(texts, on_error="skip").skipped.reasons
    assert "zstandard is not installed" in reason


def test_unreadable_files_are_named_as_such(texts, make, monkeypatch):
    def refuse(number):
        def open_it(path):
            if path.name == "0.txt":
                raise OSError(number, os.strerror(number), str(path))
            return open_content(path)

        monkeypatch.setattr("pararnn.lm.data.reading.open_content", open_it)

    refuse(13)
    with pytest.raises(RunError, match=r"cannot read .*0.txt: Permission denied; make it readable"):
        make(texts)
    assert reasons(make(texts, on_error="skip")) == {"no permission to read": 1}
    refuse(5)
    with pytest.raises(
        RunError, match=r"cannot read .*0.txt: Input/output error; .*the disk. Or l"
    ):
        make(texts, name="disk")
    assert reasons(make(texts, name="disk", on_error="skip")) == {"cannot be read": 1}
    with pytest.raises(RunError, match=r"0.txt: Input/output error"):
        make(texts / "0.txt", texts / "3.txt", name="named", on_error="skip")


def test_a_folder_that_cannot_be_entered(texts, make, monkeypatch):
    walk = os.walk

    def refuse(root, onerror):
        for folder, folders, files in walk(root):
            if folder.endswith("more"):
                onerror(PermissionError(13, "Permission denied", folder))
            else:
                yield folder, folders, files

    status = os.stat

    def refuse_inside(path, *arguments, **options):
        if str(path).startswith(f"{texts}/more/"):
            raise PermissionError(13, "Permission denied", str(path))
        return status(path, *arguments, **options)

    monkeypatch.setattr("os.walk", refuse)
    monkeypatch.setattr("os.stat", refuse_inside)
    with pytest.raises(RunError, match=r"cannot read .*1.txt: Permission denied; make it readable"):
        make(texts / "more/1.txt", name="named")
    with pytest.raises(RunError, match=r"cannot read .*more: Permission denied.*--on-error skip"):
        make(texts)
    data = make(texts, on_error="skip")
    assert data.skipped.reasons == {
        "no permission to read": {"count": 1, "first": [str(texts / "more")]}
    }


def test_links_and_what_is_no_file(texts, make, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key.txt").write_text("a secret")
    (texts / "leaves.txt").symlink_to(tmp_path / "secret/key.txt")
    (texts / "folder").symlink_to(tmp_path / "secret")
    (texts / "again").symlink_to(texts / "more")
    (texts / "twice.txt").symlink_to(texts / "0.txt")
    (texts / "broken.txt").symlink_to(texts / "gone.txt")
    (texts / ".store").mkdir()
    (texts / ".store/content").write_text("kept in the folder")
    (texts / "kept.txt").symlink_to(".store/content")
    os.mkfifo(texts / "pipe")
    data = make(texts)
    assert all_texts(data) == sorted([*SENTENCES, "kept in the folder"])
    assert reasons(data) == {
        "link that leaves the folder": 2,
        "link to a folder": 1,
        "link to another of the files": 1,
        "broken link": 1,
        "hidden": 1,
        "pipe, socket or device": 1,
    }
    (texts / "linked").symlink_to(tmp_path / "secret/key.txt")
    with pytest.raises(RunError, match="neither a file nor a folder"):
        make(texts / "pipe", name="pipe")


def test_prepared_tokens_are_no_text(texts, make, tmp_path):
    folder = make(texts).folder
    for damage in (lambda: None, (folder / "index.json").unlink):
        damage()
        with pytest.raises(RunError, match="holds prepared tokens, not texts"):
            make(folder, name="other")
    folder.rename(texts / "inside")
    assert reasons(make(texts, name="outside")) == {"prepared tokens": 1}


def test_the_same_file_twice_is_refused(texts, make):
    """It could be trained on under one name and held out under the other."""
    with pytest.raises(RunError, match=r"0.txt belongs to two of the sources .* name it once"):
        make(texts, texts / "0.txt")
    with pytest.raises(ValueError, match="is named twice"):
        PrepareConfig(sources=("datasets:a", "datasets:a"))


def test_names_that_are_no_utf8(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for number, text in enumerate(SENTENCES):
        (folder / os.fsdecode(b"n\xff%d.txt" % number)).write_text(text)
    (folder / os.fsdecode(b"\xfe.png")).write_bytes(b"\0")
    out = str(tmp_path / os.fsdecode(b"out\xff"))
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, "utf-8"))
    arguments = ["data", "prepare", str(folder), "--out", out, "--workers", "1"]
    assert main([*arguments, "--held-out", "0.2"]) == 0
    sys.stdout.flush()
    assert b"skipped: binary: 1 (" in printed.getvalue()
    assert rb"caf\udce9/\udcfe.png" in printed.getvalue()
    assert all_texts(open_tokens(out)) == sorted(SENTENCES)


def test_empty_files_are_counted(texts, make):
    for name in ("a.txt", "b.jsonl"):
        (texts / name).touch()
    assert reasons(make(texts)) == {"empty": 2}


def test_byte_order_marks_and_line_ends(tmp_path, make):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nline")
    (tmp_path / "b.txt").write_bytes(b"second")
    assert all_texts(make(tmp_path / "a.txt", tmp_path / "b.txt")) == ["first\r\nline", "second"]


def test_paths_may_be_text(texts, tmp_path):
    for sources in (str(texts), texts, [texts], (str(texts),)):
        config = PrepareConfig(sources=sources)
        assert config.sources == (str(texts),)
    assert prepare(config, str(tmp_path / "out"), workers=1) is None
    assert open_tokens(str(tmp_path / "out")).train.num_documents == 29


def test_on_error_is_checked():
    with pytest.raises(ValueError, match='on_error is \'ignore\'; it must be "stop" or "skip"'):
        PrepareConfig(sources="a", on_error="ignore")


def test_rows_of_a_dataset_without_a_text(tmp_path, make):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    rows = [*ROWS[:15], {"text": None}, {"text": ""}, *ROWS[15:]]
    (tmp_path / "set/a.jsonl").write_bytes(lines_of(rows))
    source = f"datasets:{tmp_path}/set"
    data = make(source)
    assert all_texts(data) == sorted(SENTENCES)
    assert data.skipped.reasons == {
        "row without a text": {"count": 1, "first": [f"row 15 of {tmp_path}/set"]},
        "empty": {"count": 1, "first": [f"row 16 of {tmp_path}/set"]},
    }
    (tmp_path / "set/a.jsonl").write_bytes(lines_of([{"text": 1}, {"text": 2}]))
    with pytest.raises(RunError, match=r"row 0 of .* holds int as 'text'.*--on-error skip"):
        make(source, name="numbers")


def random_folder(folder, choose):
    """Writes files of all kinds; returns their texts, and how much of them has none."""
    texts, num_without = [], 0

    def new_text():
        texts.append(f"text {len(texts)} " + "é" * choose.randrange(30))
        return texts[-1]

    for number in range(choose.randrange(5, 15)):
        suffix = choose.choice([".txt", "", ".jsonl", ".NDJSON", ".json", "list.json", ".bin"])
        rows = [{"text": new_text()} for _ in range(choose.randrange(2, 20))]
        if suffix in (".txt", ""):
            del texts[-len(rows) :]
            content = new_text().encode()
        elif suffix == "list.json":
            content = json.dumps(rows, indent=choose.choice([None, 1])).encode()
        elif suffix == ".bin":
            del texts[-len(rows) :]
            content, num_without = b"\0", num_without + 1
        else:
            content, num_without = lines_of([*rows, {}]), num_without + 1
        compression = choose.choice(["", *COMPRESS])
        content = COMPRESS.get(compression, bytes)(content)
        (folder / f"{number}{suffix}{compression}").write_bytes(content)
    return texts, num_without


@pytest.mark.parametrize("seed", range(6))
def test_every_text_is_there_once_or_counted(seed, tmp_path, make):
    choose = random.Random(seed)
    (tmp_path / "source").mkdir()
    texts, num_without = random_folder(tmp_path / "source", choose)
    sizes = {
        "unit_bytes": choose.choice([50, 300, 10**6]),
        "units_per_shard": choose.choice([1, 3]),
    }
    data = make(tmp_path / "source", on_error="skip", held_out=0.4, **sizes)
    assert all_texts(data) == sorted(texts)
    assert data.skipped.total == num_without
