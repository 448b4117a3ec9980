"""The three kinds of tokenizer, and what of them is stored."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pararnn.lm.data import PrepareConfig, tokenization
from pararnn.lm.training import RunError

from .conftest import contents, documents, sentence

SENTENCES = [sentence(n) for n in range(30)]


def decoded(data):
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    return sorted(
        tokenizer.decode(document)
        for s in (data.train, data.validation)
        for document in documents(data, s)
    )


def word_tokenizer(folder, **special):
    words = {"<unk>": 0, "</s>": 1, "gate": 2, "step": 3, "far": 70_000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", **special
    ).save_pretrained(folder)
    return str(folder)


def test_bytes(texts, make):
    data = make(texts)
    assert (data.vocab_size, data.separator, data.tokenizer) == (256, 0, None)
    assert data.train.dtype == np.uint8
    assert data.train.num_bytes + data.train.num_documents + 1 == data.train.num_tokens


def test_trained(texts, make):
    data = make(texts, tokenizer="train:300")
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    assert (data.vocab_size, data.separator) == (300, tokenizer.eos_token_id)
    assert (len(tokenizer), tokenizer.eos_token) == (300, "<|endoftext|>")
    assert data.train.dtype == np.uint16
    assert decoded(data) == sorted(SENTENCES)
    num_bytes = sum(len(text.encode()) for text in SENTENCES)
    assert data.train.num_bytes + data.validation.num_bytes == num_bytes
    assert data.train.num_tokens < data.train.num_bytes * 0.9


def test_trained_anew_it_is_the_same(texts, make):
    first, second = (make(texts, name=name, tokenizer="train:400") for name in "ab")
    assert contents(first.folder) == contents(second.folder)


def test_trained_on_little_text_it_is_smaller(texts, make):
    data = make(texts, tokenizer="train:50000")
    assert data.vocab_size == len(AutoTokenizer.from_pretrained(data.tokenizer)) < 1000


def test_from_a_folder(texts, make, tmp_path):
    data = make(texts, tokenizer=word_tokenizer(tmp_path / "words", eos_token="</s>"))
    assert (data.vocab_size, data.separator) == (70_001, 1)
    assert data.train.dtype == np.uint32
    expected = sorted([{"gate": 2, "step": 3}.get(w, 0) for w in t.split()] for t in SENTENCES)
    stored = [d.tolist() for s in (data.train, data.validation) for d in documents(data, s)]
    assert sorted(stored) == expected
    assert AutoTokenizer.from_pretrained(data.tokenizer).eos_token_id == 1


def test_another_tokenizer_in_the_same_folder_is_noticed(texts, make, tmp_path):
    folder = word_tokenizer(tmp_path / "words", eos_token="</s>")
    make(texts, tokenizer=folder)
    word_tokenizer(tmp_path / "words", eos_token="gate")
    with pytest.raises(RunError, match=r"would change files of the tokenizer from .* to "):
        make(texts, tokenizer=folder)


def test_from_another_prepared_folder(texts, make):
    first = make(texts, tokenizer="train:300")
    second = make(texts, name="again", tokenizer=str(first.tokenizer))
    assert first.sha256 == second.sha256


def test_names_of_special_tokens_are_text(lines, make):
    text = "before <|endoftext|> after"
    with lines.open("a") as file:
        file.write(json.dumps({"text": text}) + "\n")
    data = make(lines, tokenizer="train:300")
    assert decoded(data) == sorted([*SENTENCES, text])


def test_document_that_holds_the_separator_is_skipped(texts, make, tmp_path):
    (texts / "a.txt").write_text("gate </s> step")
    data = make(texts, tokenizer=word_tokenizer(tmp_path / "words", eos_token="</s>"))
    assert data.train.num_documents + data.validation.num_documents == 30
    assert json.loads((data.folder / "index.json").read_text())["num_skipped"] == 1


def test_long_documents_are_whole(tmp_path, make, recwarn):
    folder = word_tokenizer(tmp_path / "words", eos_token="</s>", model_max_length=8)
    for name in "ab":
        (tmp_path / name).write_text("gate " * 5000)
    data = make(tmp_path / "a", tmp_path / "b", tokenizer=folder)
    assert data.train.num_tokens == data.validation.num_tokens == 5002
    assert not recwarn.list


def test_no_separator_is_refused(texts, make, tmp_path):
    with pytest.raises(RunError, match=r"has no eos token.*set its eos_token, save it with save_p"):
        make(texts, tokenizer=word_tokenizer(tmp_path / "words"))


def test_not_a_tokenizer(texts, make, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"cannot load the tokenizer .*empty.* Give bytes, train:"):
        make(texts, tokenizer=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "tokenizer",
    ["train:", "train:many", "train:256", "train:-300", "train:1000000000", "train:" + "9" * 30],
)
def test_wrong_vocabulary(tokenizer):
    with pytest.raises(
        ValueError, match="write train:VOCAB_SIZE with at least 257 and at most 1,0"
    ):
        PrepareConfig(sources=("a",), tokenizer=tokenizer)


def test_a_vocabulary_that_no_model_could_have(texts, make, tmp_path):
    folder = word_tokenizer(tmp_path / "words", eos_token="</s>")
    path = tmp_path / "words/tokenizer.json"
    path.write_text(path.read_text().replace("70000", "1000000000"))
    with pytest.raises(RunError, match=r"vocabulary of 1,000,000,001 tokens; at most 1,048,576"):
        make(texts, tokenizer=folder)


def test_files_that_are_not_known_are_refused(texts, make, monkeypatch):
    known = tokenization.TOKENIZER_FILES - {"tokenizer_config.json"}
    monkeypatch.setattr(tokenization, "TOKENIZER_FILES", known)
    with pytest.raises(
        RunError, match=r"files that the library does not know \(tokenizer_config.json\)"
    ):
        make(texts, tokenizer="train:300")


def test_code_that_comes_with_a_tokenizer_is_not_run(texts, make, tmp_path):
    folder = tmp_path / "words"
    word_tokenizer(folder, eos_token="</s>")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(RunError, match="cannot load the tokenizer"):
        make(texts, tokenizer=str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_is_loaded_anew_when_its_files_change(tmp_path):
    folder = tmp_path / "words"
    word_tokenizer(folder, eos_token="</s>")
    first = tokenization.load_tokenizer(folder)
    assert tokenization.load_tokenizer(folder) is first
    word_tokenizer(folder, eos_token="gate")
    assert (first.separator, tokenization.load_tokenizer(folder).separator) == (1, 2)


def test_a_tokenizer_changed_between_two_calls_is_refused(texts, make, tmp_path, monkeypatch):
    """One that is found by its path could be another when a stopped run goes on."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pararnn.lm.data.units.Merger.merge_last", stop)
        with pytest.raises(KeyboardInterrupt):
            make(texts, tokenizer="train:300")
    path = tmp_path / "tokens/tokenizer/tokenizer_config.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "a"))
    with pytest.raises(
        RunError, match=r"tokenizer_config.json does not have its checksum; restore"
    ):
        make(texts, tokenizer="train:300")
