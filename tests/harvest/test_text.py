"""The corpus: files of every kind, how text without documents is cut, what is held out."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_train.config import DataConfig
from sae_train.errors import DataError
from sae_train.harvest.corpus import HELD_OUT_SHARE, Corpus
from sae_train.harvest.open_text import check_data
from sae_train.harvest.plain_text import BLOCK_BYTES, LEAST_BLOCK_BYTES, TextBlocks, block_bytes_of
from tools.tiny_models import live_config, sentences

TEXTS = sentences(30)


def data_at(path: Path | str, *, held_out: Path | None = None, column: str = "text") -> DataConfig:
    return live_config(data=path, held_out=held_out, text_column=column).data


def write_lines(path: Path, texts: list[str], column: str = "text") -> Path:
    raw = "".join(json.dumps({column: text}) + "\n" for text in texts).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(raw))
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


def texts_of(corpus: Corpus) -> list[str]:
    """Return the whole documents, by one part each."""
    return [corpus.part(index, 0, 10**9, window=0).text for index in range(len(corpus))]


def held_out_of(corpus: Corpus) -> list[str]:
    """Return the held-out documents, put together from their pieces."""
    texts = [""]
    for part in corpus.held_out_parts():
        texts[-1] += part.text
        texts += [""] if part.is_end else []
    return texts[:-1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write = write_parquet if name.endswith("parquet") else write_lines
    corpus = Corpus(data_at(write(tmp_path / name, TEXTS)))
    assert texts_of(corpus) == TEXTS


def test_a_directory_is_all_its_files_in_sorted_order(tmp_path):
    write_lines(tmp_path / "b.jsonl", TEXTS[10:])
    (tmp_path / "deep").mkdir()
    write_lines(tmp_path / "a.jsonl.xz", TEXTS[:10])
    write_lines(tmp_path / "deep" / "c.jsonl", ["last"])
    (tmp_path / "notes.md").write_text("not text to train on")
    corpus = Corpus(data_at(tmp_path))
    assert texts_of(corpus) == [*TEXTS, "last"]


def test_blank_lines_are_no_documents(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n\n  \n", 3))
    assert len(Corpus(data_at(path))) == len(TEXTS)


@given(
    text=st.text(alphabet=st.sampled_from(["a", "\n", "\u00e9", "\u6f22", "b"]), min_size=1, max_size=300),
    block_bytes=st.integers(1, 64),
)
def test_blocks_are_whole_characters_and_lose_nothing(tmp_path_factory, text, block_bytes):
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes(text.encode())
    blocks = TextBlocks(path, block_bytes=block_bytes)
    found = [blocks.read(index).data.decode() for index in range(len(blocks))]
    assert "".join(found) == text
    assert [blocks.ends_document(index) for index in range(len(blocks))] == [False] * (len(blocks) - 1) + [True]
    for block in found[:-1]:
        assert block_bytes <= len(block.encode()) <= 2 * block_bytes + 2
        assert block.endswith("\n") or "\n" not in block[-1:]


def test_blocks_end_at_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {index}\n" for index in range(500)))
    blocks = TextBlocks(path, block_bytes=100)
    assert len(blocks) > 30
    found = [blocks.read(index).data for index in range(len(blocks))]
    assert all(block.endswith(b"\n") and block.startswith(b"line") for block in found)


def test_blocks_are_64_kib_or_less_in_a_short_text():
    assert block_bytes_of(10**9) == BLOCK_BYTES
    assert block_bytes_of(1_280_000) == 10_000
    assert block_bytes_of(0) == LEAST_BLOCK_BYTES


def test_held_out_documents_are_two_percent_by_their_text_alone(tmp_path):
    texts = sentences(5000, words=8)
    corpus = Corpus(data_at(write_lines(tmp_path / "a.jsonl", texts)))
    held_out = set(held_out_of(corpus))
    assert 0.5 * HELD_OUT_SHARE < len(held_out) / len(texts) < 1.5 * HELD_OUT_SHARE
    shuffled = Corpus(data_at(write_lines(tmp_path / "b.jsonl", texts[::-1] + texts[:100])))
    assert set(held_out_of(shuffled)) == held_out, "a copy or another place changes no side"
    assert {text for index, text in enumerate(texts) if corpus.holds_out(index)} == held_out


@given(n=st.integers(3, 40), seed=st.integers(0, 1000))
def test_at_least_two_documents_are_held_out_and_one_is_not(tmp_path_factory, n, seed):
    path = write_lines(tmp_path_factory.mktemp("few") / "a.jsonl", sentences(n, seed=seed, words=4))
    corpus = Corpus(data_at(path))
    assert 2 <= len(list(held_out_of(corpus))) < n


def test_a_split_of_its_own_is_held_out_whole_and_nothing_else(tmp_path):
    write_lines(tmp_path / "train.jsonl", TEXTS)
    held_out = write_lines(tmp_path / "val.jsonl", ["one", "two"])
    corpus = Corpus(data_at(tmp_path, held_out=held_out))
    assert texts_of(corpus) == TEXTS, "the held-out file lies in the same directory"
    assert list(held_out_of(corpus)) == ["one", "two"]
    assert not any(corpus.holds_out(index) for index in range(len(corpus)))


def test_the_bundled_corpus():
    corpus = Corpus(data_at("bundled"))
    held_out = list(held_out_of(corpus))
    assert len(corpus) > 1000
    assert len(held_out) > 50
    assert not set(held_out) & set(texts_of(corpus))


def test_the_fingerprint_changes_with_the_text(tmp_path):
    first = Corpus(data_at(write_lines(tmp_path / "a.jsonl", TEXTS))).fingerprint()
    assert Corpus(data_at(write_lines(tmp_path / "b.jsonl", TEXTS))).fingerprint() == first
    assert Corpus(data_at(write_lines(tmp_path / "c.jsonl", TEXTS[:-1]))).fingerprint() != first


def refusal(data: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        Corpus(data)
    assert caught.value.status == 2
    return str(caught.value)


def test_refusals_of_files(tmp_path):
    write_lines(tmp_path / "train.jsonl", TEXTS)
    assert "no such file" in refusal(data_at(tmp_path / "nothing"))
    assert "Did you mean 'train.jsonl'" in refusal(data_at(tmp_path / "trian.jsonl"))
    assert "Known kinds: .txt, .jsonl" in refusal(data_at(write_lines(tmp_path / "a.csv", TEXTS)))
    (tmp_path / "empty").mkdir()
    assert "no text files" in refusal(data_at(tmp_path / "empty"))
    (tmp_path / "empty" / "a.jsonl").touch()
    (tmp_path / "empty" / "b.txt").touch()
    assert "holds no text" in refusal(data_at(tmp_path / "empty"))
    assert "Did you mean 'text'" in refusal(data_at(tmp_path / "train.jsonl", column="texts"))
    assert "data.held_out_split" in refusal(data_at(tmp_path / "train.jsonl", held_out=tmp_path / "val.jsonl"))


def test_refusals_of_files_of_which_nothing_can_be_read(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"body": "x"}\n')
    assert "line 1 has no such key. Known: body" in refusal(data_at(bad))
    bad.write_text('{"text": 7}\n')
    assert "holds int there, not text" in refusal(data_at(bad))
    whole = lzma.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "cut.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    assert "cannot be unpacked" in refusal(data_at(tmp_path / "cut.jsonl.xz"))
    (tmp_path / "cut.jsonl.gz").write_bytes(b"nonsense")
    assert "cannot be unpacked" in refusal(data_at(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nonsense")
    assert "not a readable parquet file" in refusal(data_at(tmp_path / "no.parquet"))
    two = write_lines(tmp_path / "two.jsonl", TEXTS[:2])
    assert "leave none to train on" in refusal(data_at(two))


def test_a_dataset_that_the_hub_cannot_give():
    with pytest.raises(DataError, match="hub cannot be reached"):
        check_data(data_at("someone/no-such-dataset"))
