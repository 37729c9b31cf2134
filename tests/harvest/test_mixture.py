"""What is trained on has the corpus's own mixture, whatever the file looks like; stretches tile the text exactly."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_train.cli.train import run_command
from sae_train.harvest import corpus as corpus_module
from sae_train.harvest.corpus import Corpus
from sae_train.harvest.lanes import Lane, Packer, check_lanes
from sae_train.harvest.language_model import Tokenizer
from sae_train.harvest.stretches import Stretches
from tools.command_line import changed
from tools.tiny_models import live_config, save_tokenizer
from tools.tiny_runs import tiny_run

QUESTION, ANSWER = "qwxyz", "abcdefg"
"""Letters of two kinds of text: a token says which kind it is from, and the kinds differ in tokens a byte."""
Texts = list[str]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, bos_token="<bos>", eos_token="<eos>")
    return Tokenizer(live_config(folder).model)


def words(draw: random.Random, letters: str, n_bytes: int) -> str:
    text = ""
    while len(text) < n_bytes:
        text += "".join(draw.choices(letters, k=draw.randint(2, 9))) + draw.choice("  \n")
    return text


def two_kinds_in_each_document(draw: random.Random) -> Texts:
    """A long answer whose last part is made of questions."""
    return [words(draw, ANSWER, 12_000) + words(draw, QUESTION, 2000) for _ in range(12)]


def alternating(draw: random.Random) -> Texts:
    """A short question, then a long answer, and so on."""
    return [words(draw, QUESTION, 60) if n % 2 == 0 else words(draw, ANSWER, 1500) for n in range(200)]


def few_long_among_short(draw: random.Random) -> Texts:
    return [words(draw, ANSWER, 30_000) for _ in range(4)] + [words(draw, QUESTION, 100) for _ in range(500)]


def a_period_of_the_lanes(draw: random.Random) -> Texts:
    """Every 16th row is a question, and there are 16 lanes."""
    return [words(draw, QUESTION if n % 16 == 0 else ANSWER, 200) for n in range(800)]


def hardly_enough(draw: random.Random) -> Texts:
    """Hardly more text than a context for each lane."""
    return [words(draw, QUESTION if n % 3 == 0 else ANSWER, draw.randint(40, 700)) for n in range(28)]


def every_second_empty(draw: random.Random) -> Texts:
    return ["" if n % 2 else words(draw, QUESTION if n % 4 == 0 else ANSWER, 300) for n in range(400)]


def corpus_of(folder: Path, texts: Texts) -> Corpus:
    """Return a corpus of all these texts; what is held out lies elsewhere."""
    (folder / "held.jsonl").write_text(json.dumps({"text": "kept apart"}) + "\n")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus(live_config(data=folder / "a.jsonl", held_out=folder / "held.jsonl").data)


@pytest.mark.parametrize(
    "kind",
    [
        alternating,
        few_long_among_short,
        a_period_of_the_lanes,
        hardly_enough,
        every_second_empty,
        two_kinds_in_each_document,
    ],
)
def test_each_kind_of_text_has_its_share_of_the_tokens(
    tmp_path: Path, tokenizer: Tokenizer, kind: Callable[[random.Random], Texts]
) -> None:
    texts, lanes, length = kind(random.Random(0)), 16, 64
    corpus = corpus_of(tmp_path, texts)
    check_lanes(corpus, tokenizer, lanes=lanes, context_length=length, batch_tokens=lanes, n_ranks=1)
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text)])
    is_question = torch.zeros(1000, dtype=torch.bool)
    is_question[tokenizer.encode(words(random.Random(1), QUESTION, 20_000))] = True
    is_question[tokenizer.encode(words(random.Random(1), ANSWER, 20_000))] = False
    expected = float(is_question[ids].double().mean())
    stretches = corpus.stretches(lanes, context_length=length, tokenizer=tokenizer)
    n_contexts = max(2 * len(ids), 40_000) // lanes // (length - 1)
    found, epochs = [], []
    for index in range(lanes):
        lane = Lane(index, stretches=stretches, corpus=corpus, tokenizer=tokenizer, context_length=length, seed=0,
                    repeat=True)  # fmt: skip
        read = lane.contexts(n_contexts).flatten()
        found.append(is_question[read[~torch.isin(read, torch.tensor(tokenizer.special_ids))]].double())
        epochs.append(lane.epochs(lane.state()))
    n_tokens = min(map(len, found))  # every lane gives as many to each batch
    share = float(torch.cat([each[:n_tokens] for each in found]).mean())
    assert expected > 0.005
    assert share == pytest.approx(expected, rel=0.03)
    assert max(epochs) - min(epochs) < 1


@pytest.mark.parametrize("kind", [alternating, a_period_of_the_lanes])
def test_so_it_has_in_a_text_of_too_many_pieces_to_measure(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: Callable[[random.Random], Texts]
) -> None:
    monkeypatch.setattr(corpus_module, "MEASURED_PIECES", 0)
    test_each_kind_of_text_has_its_share_of_the_tokens(tmp_path, tokenizer, kind)


def test_dealing_documents_by_their_number_would_not_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The measure of the test above can fail: lanes of whole documents, dealt in turns, give half questions."""
    texts = alternating(random.Random(0))
    by_lane = [[len(tokenizer.encode(text)) for text in texts[lane::2]] for lane in range(2)]
    questions = sum(by_lane[0]) / (sum(by_lane[0]) + sum(by_lane[1]))
    assert questions < 0.05  # of the corpus; and lane 0, a half of every batch, would be nothing else
    corpus = corpus_of(tmp_path, texts)
    for index in range(2):
        segments = corpus.stretches(2, context_length=64, tokenizer=tokenizer).segments(index)
        assert 0.3 < (segments[:, 0] % 2 == 0).double().mean() < 0.7, "both lanes hold both kinds"


def in_few_tokens(segments: torch.Tensor) -> torch.Tensor:
    """Return one token for 700 bytes: none for many pieces."""
    return (segments[:, 2] - segments[:, 1]) // 700


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=30),
    lanes=st.integers(1, 20),
    context_length=st.integers(4, 300),
    in_tokens=st.booleans(),
    seed=st.integers(0, 3),
)
def test_stretches_tile_the_documents(
    sizes: list[int], lanes: int, context_length: int, in_tokens: bool, seed: int
) -> None:
    n_bytes = torch.tensor(sizes)
    measured = {"measure": in_few_tokens} if in_tokens else {}
    stretches = Stretches(n_bytes, **measured, lanes=lanes, context_length=context_length, seed=seed)
    seen = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    lengths = []
    for lane in range(lanes):
        segments = stretches.segments(lane)
        for document, start, stop in segments.tolist():
            assert 0 <= start <= stop <= sizes[document]
            assert stop - start <= max(4096, 4 * context_length)
            seen[document][start:stop] += 1
        lengths.append(int((segments[:, 2] - segments[:, 1]).sum()))
    assert all((count == 1).all() for count in seen), "each byte once"
    if not in_tokens:
        assert max(lengths) - min(lengths) <= 1


@given(
    whole=st.text(alphabet="ab \n\u00e9\u6f22\U0001f600", min_size=1, max_size=400),
    places=st.lists(st.integers(0, 1200), max_size=8),
    window=st.integers(0, 50),
)
def test_parts_that_meet_lose_nothing_and_read_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory, whole: str, places: list[int], window: int
) -> None:
    corpus = corpus_of(tmp_path_factory.mktemp("parts"), [whole, "another"])
    size = len(whole.encode())
    cuts = sorted({0, size, *(place for place in places if place < size)})
    parts = [corpus.part(0, a, b, window=window) for a, b in itertools.pairwise(cuts)]
    assert "".join(part.text for part in parts) == whole
    assert sum(part.is_end for part in parts) == 1
    assert next(part.text for part in reversed(parts) if part.is_end) != ""


def test_an_end_token_follows_a_documents_last_piece_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [words(random.Random(n), ANSWER, 40_000) for n in range(3)]
    corpus = corpus_of(tmp_path, texts)
    stretches = corpus.stretches(2, context_length=64, tokenizer=tokenizer)
    lanes = [Lane(index, stretches=stretches, corpus=corpus, tokenizer=tokenizer, context_length=64, seed=0,
                  repeat=False) for index in range(2)]  # fmt: skip
    read = [
        token for lane in lanes for token in lane.contexts(10**6).flatten().tolist() + lane.state()["tokens"].tolist()
    ]
    assert read.count(tokenizer.eos) == len(texts)


def test_a_cursor_does_not_grow_with_a_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = corpus_of(tmp_path, [words(random.Random(0), ANSWER, 300_000), "short"])
    stretches = corpus.stretches(2, context_length=16, tokenizer=tokenizer)
    lane = Lane(0, stretches=stretches, corpus=corpus, tokenizer=tokenizer, context_length=16, seed=0, repeat=True)
    for _ in range(50):
        lane.contexts(4)
        assert len(lane.state()["tokens"]) < 4096 + 16


@pytest.mark.slow
def test_lanes_that_are_epochs_apart_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lane with many marks that are not trained on reads its text more often than others."""
    marks = Tokenizer(live_config().model)
    end = "<|eos|>"
    assert marks.encode(end) == [marks.eos]
    texts = [*(words(random.Random(n), ANSWER, 300) for n in range(30)), end * 1500]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": words(random.Random(99), ANSWER, 9000)}) + "\n")
    data = ["data=files", f"data.id={tmp_path / 'a.jsonl'}", f"data.held_out_split={tmp_path / 'held.jsonl'}"]
    assert run_command([*changed(tiny_run(tmp_path), "tokens=81920", "log_every=8192"), *data]) == 0
    assert capsys.readouterr().err.count("epochs apart") == 1
    (rows,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    spread = [row["data/epoch_spread"] for row in found if "data/epoch_spread" in row]
    assert spread[0] < 1 < spread[-1]
    assert all(row["data/epochs"] > 1 for row in found[-2:-1])


def test_a_document_that_ends_in_blanks_has_its_end_token(tmp_path: Path) -> None:
    """BERT-like tokenizers give no tokens for blanks."""
    save_tokenizer(tmp_path, bos_token="<bos>", eos_token="<eos>")
    tokenizer = Tokenizer(live_config(tmp_path).model)
    packer = Packer(tokenizer, context_length=8)
    packer.add("abc", is_end=False)
    tokenizer.encode = lambda text: []  # type: ignore[method-assign]
    packer.add("   ", is_end=True)
    packer.add("", is_end=True)
    assert packer.tokens.count(tokenizer.eos) == 1
