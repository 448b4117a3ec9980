"""The stored form: separators, counts, reading across shards, damage."""

import json
import pickle

import numpy as np
import pytest

from pararnn.lm.data import open_tokens
from pararnn.lm.training import RunError

from .conftest import contents, read_all, sentence


def test_layout_and_counts(texts, make):
    data = make(texts)
    index = json.loads((data.folder / "index.json").read_text())
    assert set(contents(data.folder)) == {"index.json"} | {
        shard["file"] for shards in index["splits"].values() for shard in shards
    }
    num_bytes = sum(len(sentence(n).encode()) for n in range(30))
    assert data.train.num_bytes + data.validation.num_bytes == num_bytes
    assert data.train.num_documents + data.validation.num_documents == 30
    for split in (data.train, data.validation):
        tokens = read_all(split)
        assert tokens.dtype == np.int64
        assert len(split.shards) > 1
        assert (tokens == data.separator).sum() == split.num_documents + 1
        assert (tokens[0], tokens[-1]) == (data.separator, data.separator)
        files = [(data.folder / s.file).read_bytes() for s in split.shards]
        assert b"".join(files) == bytes(tokens.astype(np.uint8))


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_read_across_shards(tokenizer, texts, make):
    split = make(texts, tokenizer=tokenizer).train
    tokens = read_all(split)
    ends = np.cumsum([0, *(shard.num_tokens for shard in split.shards)])
    for start in ends[:-1]:
        for stop in ends:
            for a, b in ((start, stop), (start + 1, stop - 1), (max(start - 1, 0), stop)):
                if a <= b:
                    np.testing.assert_array_equal(split.read(a, b), tokens[a:b])
    assert split.read(split.num_tokens, split.num_tokens).shape == (0,)
    for start, stop in ((-1, 1), (2, 1), (0, split.num_tokens + 1)):
        with pytest.raises(IndexError, match="of a split of"):
            split.read(start, stop)


def test_an_open_dataset_can_be_sent_to_a_process(texts, make):
    data = make(texts)
    read_all(data.train)
    pickled = pickle.dumps(data)
    assert len(pickled) < 5000
    np.testing.assert_array_equal(read_all(pickle.loads(pickled).train), read_all(data.train))


def test_digest_is_of_all_shards(texts, make):
    first, same = make(texts), make(texts, name="same")
    (texts / "0.txt").write_text("other")
    other = make(texts, name="other")
    assert first.sha256 == same.sha256 != other.sha256


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"bytes instead of \d+"),
        (lambda p: p.write_bytes(p.read_bytes() + b"a"), r"bytes instead of \d+"),
        (lambda p: p.write_bytes(b""), "has 0 bytes"),
        (lambda p: p.write_bytes(b"b" + p.read_bytes()[1:]), "does not have the checksum"),
        (lambda p: p.unlink(), "is missing"),
    ],
    ids=["shorter", "longer", "empty", "changed", "missing"],
)
@pytest.mark.parametrize("name", ["train-00001.bin", "validation-00000.bin"])
def test_damaged_shard_is_named(name, damage, message, texts, make):
    folder = make(texts).folder
    damage(folder / name)
    with pytest.raises(RunError, match=f"{name} .*{message}.*restore it|{name} {message}"):
        open_tokens(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "index.json is damaged"),
        ("[]", "index.json is damaged"),
        ('{"format": "pararnn-tokens", "version": 2}', "index.json is damaged"),
        ('{"format": "pararnn-tokens", "version": 9}', "format pararnn-tokens 9, but"),
    ],
)
def test_damaged_index(content, message, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(RunError, match=message):
        open_tokens(tmp_path)


def test_no_prepared_data(tmp_path):
    with pytest.raises(RunError, match=r"holds no prepared data.*pararnn data prepare SOURCE"):
        open_tokens(tmp_path)
