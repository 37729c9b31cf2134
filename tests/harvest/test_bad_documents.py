"""Documents that are damaged, empty or no text: counted and left out or repaired, never the end of a run."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_train.cli.train import run_command
from sae_train.config import DataConfig
from sae_train.errors import DataError
from sae_train.harvest import inspected_documents, open_text
from sae_train.harvest.corpus import Corpus
from tools.command_line import Command
from tools.tiny_models import live_config, sentences
from tools.tiny_runs import tiny_run

GOOD = [sentence.encode() for sentence in sentences(40)]
LINES: dict[str, tuple[bytes, str, str, str]] = {
    "half of a surrogate pair": (rb'{"text": "a \ud83d b"}', "a \ufffd b", "repaired", "half of a surrogate pair"),
    "two halves in the wrong order": (rb'{"text": "\ude00\ud83d"}', "\ufffd\ufffd", "repaired", "half of a surrogate"),
    "bytes that are not UTF-8": (b'{"text": "caf\xe9 noir"}', "caf\ufffd noir", "repaired", "not UTF-8"),
    "null": (b'{"text": null}', "", "empty", "null"),
    "empty": (b'{"text": ""}', "", "empty", "empty"),
    "not JSON": (b'{"text": "cut', "", "unusable", "not JSON"),
    "too deep": (b'{"text": ' + b"[" * 100_000, "", "unusable", "not JSON"),
    "no object": (b'["text"]', "", "unusable", "not a JSON object"),
    "another key": (b'{"body": "x"}', "", "unusable", "has no such key"),
    "a number": (b'{"text": 7}', "", "unusable", "holds int there"),
    "a list": (b'{"text": ["a"]}', "", "unusable", "holds list there"),
}
"""A line, what is read of it, how it is counted, and what strict says."""


def data_at(path: Path, **settings: Any) -> DataConfig:
    return live_config(data=path, **settings).data


def lines_with(folder: Path, line: bytes, *, at: int = 30) -> Path:
    good = [json.dumps({"text": one.decode()}).encode() for one in GOOD]
    path = folder / "a.jsonl"
    path.write_bytes(b"\n".join([*good[:at], line, *good[at:]]) + b"\n")
    return path


def read_all(corpus: Corpus) -> list[str]:
    """Return every document, those that are held out among them."""
    trained_on = [index for index in range(len(corpus)) if not corpus.holds_out(index)]
    texts = [corpus.part(index, 0, 10**9, window=0).text for index in trained_on]
    return texts + [part.text for part in corpus.held_out_parts()]


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("is_scanned", [True, False])
def test_a_bad_line_costs_its_document_alone(tmp_path, monkeypatch, case, is_scanned):
    line, expected, kind, reason = LINES[case]
    if not is_scanned:
        for module in (inspected_documents, open_text):
            monkeypatch.setattr(module, "SCANNED_BYTES", 0)
        monkeypatch.setattr(inspected_documents, "SAMPLED_DOCUMENTS", 5)
    path = lines_with(tmp_path, line)
    corpus = Corpus(data_at(path))
    read = [one for one in read_all(corpus) if one]
    assert sorted(read) == sorted([one.decode() for one in GOOD] + ([expected] if expected else []))
    counts = {"documents": 41, "empty": 0, "repaired": 0, "unusable": 0, kind: 1}
    assert corpus.counts() == counts
    (notice,) = corpus.notices()
    assert "of 41 documents" in notice
    assert ("line 31" in notice) == (kind != "empty")
    with pytest.raises(DataError, match=r"data\.strict=true") as caught:
        read_all(Corpus(data_at(path, strict=True)))
    assert f"{path}, line 31" in str(caught.value)
    assert reason in str(caught.value)


@given(lines=st.lists(st.binary(max_size=30), max_size=6))
def test_no_line_ends_a_run(tmp_path_factory, lines):
    path = lines_with(tmp_path_factory.mktemp("any"), b"\n".join(lines))
    corpus = Corpus(data_at(path))
    assert {one.decode() for one in GOOD} <= set(read_all(corpus))
    assert all(one.encode().decode() == one for one in read_all(corpus))


@pytest.mark.parametrize("place", [3, 5000])
def test_text_that_is_not_utf_8_is_replaced_and_counted(tmp_path, place):
    whole = b"\n".join(GOOD) * 20
    path = tmp_path / "a.txt"
    path.write_bytes(whole[:place] + b"\xe9\xff" + whole[place:])
    corpus = Corpus(data_at(path))
    assert corpus.counts()["repaired"] == 1
    read = "".join(read_all(corpus))
    assert read.count("\ufffd") == 2
    assert len(read) == len(whole) + 2
    with pytest.raises(DataError, match=f"byte {place} is not UTF-8"):
        Corpus(data_at(path, strict=True))


def write_parquet(path: Path, column: list[str | None]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(column, pyarrow.string())}), path)
    return path


def test_nulls_of_a_parquet_file_are_counted_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    good = [one.decode() for one in GOOD]
    path = write_parquet(tmp_path / "a.parquet", [*good, *[None] * 7, "", *good[:2]])
    corpus = Corpus(data_at(path))
    assert corpus.counts() == {"documents": 50, "empty": 8, "repaired": 0, "unusable": 0}
    assert sorted(one for one in read_all(corpus) if one) == sorted(good + good[:2])
    with pytest.raises(DataError, match="row 40: 'text' is null or empty"):
        Corpus(data_at(path, strict=True))
    with pytest.raises(DataError, match="holds no text"):
        Corpus(data_at(write_parquet(tmp_path / "nulls.parquet", [None] * 50)))


def test_a_column_of_numbers_is_refused(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds int64 there, not text"):
        Corpus(data_at(tmp_path / "a.parquet"))


def test_a_long_line_is_read_in_pieces(tmp_path, monkeypatch):
    for module in (inspected_documents, open_text):
        monkeypatch.setattr(module, "SCANNED_BYTES", 0)
    long = ("caf\u00e9 \U0001f600 " * 20_000).strip()
    path = lines_with(tmp_path, json.dumps({"text": long}).encode(), at=40)
    corpus = Corpus(data_at(path, held_out=lines_with_good(tmp_path)))
    size = len(path.read_bytes().splitlines()[40])  # that is all that is known before it is read
    cuts = itertools.pairwise([*range(0, size, 4096), size])
    parts = [corpus.part(40, low, high, window=100) for low, high in cuts]
    assert "".join(part.text for part in parts) == long
    assert [part.is_end for part in parts].count(True) == 1


def lines_with_good(folder: Path) -> Path:
    path = folder / "held.jsonl"
    path.write_text(json.dumps({"text": "kept apart"}) + "\n")
    return path


def test_a_run_says_once_what_is_wrong_and_keeps_it_in_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps({"text": one}).encode() for one in sentences(400)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good, *(line for line, *_ in LINES.values())]))
    arguments = [*tiny_run(tmp_path), "data=files", f"data.id={tmp_path / 'a.jsonl'}"]
    assert run_command([*arguments, "dry_run=true"]) == 0
    assert "of 411 documents 2 empty or null" in capsys.readouterr().out
    assert run_command(arguments) == 0
    assert capsys.readouterr().err.count("of 411 documents 2 empty or null") == 1
    (summary,) = (tmp_path / "runs").glob("*/summary.json")
    assert json.loads(summary.read_text())["data"] == {"documents": 411, "empty": 2, "repaired": 3, "unusable": 6}
    assert run_command([*arguments, "data.strict=true"]) == 2
    assert "line 401" in capsys.readouterr().err


def test_hidden_files_and_folders_are_not_read(tmp_path):
    for name in ("a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", "deep/.git/b.txt", "deep/b.jsonl"):
        path = tmp_path / ".hidden above is fine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x00\x05\x16" if name.startswith("._") else b"".join(
            json.dumps({"text": f"{name} {one.decode()}"}).encode() + b"\n" for one in GOOD))  # fmt: skip
    corpus = Corpus(data_at(tmp_path / ".hidden above is fine"))
    assert len(corpus) == 2 * len(GOOD)
    assert {one.split(".jsonl ")[0] for one in read_all(corpus)} == {"a", "deep/b"}


def test_directories_that_datasets_saved(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [one.decode() for one in GOOD]})
    rows.save_to_disk(str(tmp_path / "one"))
    assert sorted(read_all(Corpus(data_at(tmp_path / "one")))) == sorted(one.decode() for one in GOOD)
    chosen = rows.select(range(0, 40, 2))  # rows by an index, which is saved with them
    datasets.DatasetDict({"train": chosen, "val": rows.select([1, 3])}).save_to_disk(str(tmp_path / "two"))
    corpus = Corpus(data_at(tmp_path / "two", held_out=Path("val")))
    assert len(corpus) == 20
    assert [part.text for part in corpus.held_out_parts()] == [GOOD[1].decode(), GOOD[3].decode()]
    with pytest.raises(DataError, match=r"no such split\. Did you mean 'val'"):
        Corpus(data_at(tmp_path / "two", held_out=Path("vall")))
    with pytest.raises(DataError, match="no such column"):
        Corpus(data_at(tmp_path / "one", text_column="texts"))
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot load it again"):
        Corpus(data_at(tmp_path / "one"))


@pytest.mark.parametrize("same", ["file", "folder", "folder of it all"])
def test_held_out_text_that_is_all_there_is(tmp_path, same):
    path = lines_with(tmp_path, b"")
    given, held_out = {"file": (path, path), "folder": (tmp_path, tmp_path), "folder of it all": (path, tmp_path)}[same]
    with pytest.raises(DataError, match=r"data\.held_out_split=.*trained on|nothing is left to train on"):
        Corpus(data_at(given, held_out=held_out))


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["HOME", "HF_HOME", "HF_DATASETS_CACHE"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, command: Command, broken: str) -> None:
    (tmp_path / "file").write_text("")
    path = write_parquet(tmp_path / "a.parquet", [one.decode() for one in GOOD])
    variables = {"HF_HOME": "", "HF_DATASETS_CACHE": "", "XDG_CACHE_HOME": ""}
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment |= {broken: str(tmp_path / "file" / "below")}
    done = command(*tiny_run(tmp_path), "data=files", f"data.id={path}", "dry_run=true", **environment)
    assert done.status == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "HF_HOME" in done.stderr
    assert "not a readable parquet file" not in done.stderr


@pytest.mark.parametrize("line", [b'{"text": ""}', b'{"text": null}', b'{"text": 7}', b'{"body": "x"}'])
def test_held_out_files_are_checked_too(tmp_path, line):
    held_out = tmp_path / "held.jsonl"
    held_out.write_bytes(b'{"text": "kept apart"}\n' + line + b'\n{"text": "this too"}\n')
    path = lines_with(tmp_path, b"")
    corpus = Corpus(data_at(path, held_out=held_out))
    assert [part.text for part in corpus.held_out_parts()] == ["kept apart", "this too"]
    (notice,) = corpus.notices()
    assert notice.startswith(f"data.held_out_split={held_out}: of 3 documents 1 ")
    assert sum(corpus.counts()[f"held_out_{kind}"] for kind in ("empty", "unusable")) == 1
    with pytest.raises(DataError, match=r"held\.jsonl, line 2: .*data\.strict=true|line 2 .*data\.strict=true"):
        Corpus(data_at(path, held_out=held_out, strict=True))


def test_a_large_text_with_held_out_files_is_counted_as_it_is_met(tmp_path, monkeypatch):
    for module in (inspected_documents, open_text):
        monkeypatch.setattr(module, "SCANNED_BYTES", 0)
    monkeypatch.setattr(inspected_documents, "SAMPLED_DOCUMENTS", 3)
    path = lines_with(tmp_path, b'{"text": null}', at=25)
    corpus = Corpus(data_at(path, held_out=lines_with_good(tmp_path)))
    read_all(corpus)
    assert corpus.counts()["empty"] == 1
    with pytest.raises(DataError, match=r"data\.strict=true"):
        read_all(Corpus(data_at(path, held_out=lines_with_good(tmp_path), strict=True)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_files_that_say_that_they_are_in_another_unicode(tmp_path, encoding):
    text_of = "".join(f"{one.decode()}\n" for one in GOOD) * 3
    (tmp_path / "a.txt").write_bytes(text_of.encode(encoding))
    corpus = Corpus(data_at(tmp_path / "a.txt", held_out=lines_with_good(tmp_path)))
    assert "".join(read_all(corpus)[:-1]) == text_of
    assert corpus.counts()["repaired"] == 0


def test_parquet_files_of_odd_kinds(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    good = [one.decode() for one in GOOD]
    odd = {
        "no rows": pyarrow.table({"text": pyarrow.array([], pyarrow.string())}),
        "a map in another column": pyarrow.table({
            "text": good, "m": pyarrow.array([[("a", 1)]] * 40, pyarrow.map_(pyarrow.string(), pyarrow.int64()))}),
        "a view": pyarrow.table({"text": pyarrow.array(good, pyarrow.string_view())}),
        "a dictionary": pyarrow.table({"text": pyarrow.array(good).dictionary_encode()}),
        "not UTF-8": pyarrow.table({"text": pyarrow.array([b"caf\xe9"] * 2, pyarrow.binary()).view(pyarrow.string())}),
    }  # fmt: skip
    for name, table in odd.items():
        folder = tmp_path / name
        folder.mkdir()
        pyarrow.parquet.write_table(table, folder / "a.parquet")
        write_parquet(folder / "b.parquet", [*good])
        corpus = Corpus(data_at(folder, held_out=lines_with_good(tmp_path)))
        assert len(corpus) == len(table) + 40
        assert corpus.counts()["repaired"] == (2 if name == "not UTF-8" else 0)
        assert set(good) <= set(read_all(corpus))


@pytest.mark.parametrize("spelling", ["{}/", "{}/.", "{}/../two", "{}/train"])
def test_a_saved_directory_is_not_its_own_held_out_text(tmp_path, spelling):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [one.decode() for one in GOOD]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "two"))
    config = data_at(tmp_path / "two")
    config.held_out_split = spelling.format(tmp_path / "two")
    with pytest.raises(DataError, match="this is what is trained on"):
        Corpus(config)


def test_what_is_unusable_at_the_front_does_not_refuse_a_large_text(tmp_path, monkeypatch):
    for module in (inspected_documents, open_text):
        monkeypatch.setattr(module, "SCANNED_BYTES", 0)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a_meta.jsonl").write_text('{"info": 1}\n' * 150)
    (tmp_path / "text" / "b.jsonl").write_bytes(b"".join(json.dumps({"text": one.decode()}).encode() + b"\n"
                                                         for one in GOOD * 10))  # fmt: skip
    corpus = Corpus(data_at(tmp_path / "text", held_out=lines_with_good(tmp_path)))
    assert len(read_all(corpus)) == 150 + 400 + 1
