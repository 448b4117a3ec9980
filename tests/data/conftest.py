import itertools
import json
import random

import numpy as np
import pytest

from pararnn.lm.data import PrepareConfig, open_tokens, prepare

WORDS = "state step gate cell naïve Grüße ☃ don't it's 1984 \r\n \t".split(" ")


def sentence(seed, num_words=40):
    choose = random.Random(seed)
    return " ".join(choose.choice(WORDS) for _ in range(num_words))


@pytest.fixture
def texts(tmp_path):
    """A folder of 30 texts."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for number in range(30):
        name = f"more/{number}.txt" if number % 3 else f"{number}.txt"
        (folder / name).write_bytes(sentence(number).encode())
    return folder


@pytest.fixture
def lines(tmp_path):
    """A file of 30 JSON lines."""
    path = tmp_path / "rows.jsonl"
    rows = [{"number": n, "text": sentence(n)} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(tmp_path):
    """Prepares sources in small units and opens the result."""

    def run(*sources, name="tokens", workers=1, **settings):
        settings = {"held_out": 0.2, "unit_bytes": 400, "units_per_shard": 4, **settings}
        config = PrepareConfig(sources=tuple(map(str, sources)), **settings)
        assert prepare(config, tmp_path / name, workers) is None
        return open_tokens(tmp_path / name)

    return run


def read_all(split):
    return split.read(0, split.num_tokens)


def documents(data, split):
    """Tokens of each document."""
    tokens = read_all(split)
    ends = np.flatnonzero(tokens == data.separator)
    assert ends[0] == 0
    assert ends[-1] == len(tokens) - 1
    return [tokens[a + 1 : b] for a, b in itertools.pairwise(ends)]


def byte_texts(data):
    """The documents of both splits, when tokens are bytes."""
    return tuple(
        sorted(bytes(d.astype(np.uint8)).decode() for d in documents(data, split))
        for split in (data.train, data.validation)
    )


def contents(folder):
    """Every file of a folder with its content."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
