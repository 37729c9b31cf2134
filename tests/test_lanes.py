"""Lanes: what each reads and in which order, packing, cursors, and corpora that are too short."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import live_config, save_tokenizer, sentences

from sae_train.config import ModelConfig
from sae_train.errors import UserError
from sae_train.harvest.held_out import HALVES, HeldOutContexts, trainable
from sae_train.harvest.lanes import Lane, Packer, check_lanes
from sae_train.harvest.language_model import Tokenizer
from sae_train.harvest.text import Corpus

TEXTS = sentences(40, words=12)
GPT = {"bos_token": "<bos>", "eos_token": "<eos>"}
BERT = {"cls_token": "<cls>", "sep_token": "<sep>", "pad_token": "<pad>"}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    kinds = {"gpt": GPT, "bert": BERT, "bare": {}, "end": {"eos_token": "<eos>"}}
    return {name: read_tokenizer(tmp_path_factory.mktemp(name), special) for name, special in kinds.items()}


def read_tokenizer(folder: Path, special: dict[str, str]) -> Tokenizer:
    save_tokenizer(folder, **special)
    return Tokenizer(
        ModelConfig(name="m", id=str(folder), revision=None, dtype="float32", attention="sdpa", remote_code=False)
    )


def corpus_of(folder: Path, texts: list[str], *, lanes: int) -> Corpus:
    """Return a corpus that holds out none of `texts`."""
    (folder / "held").mkdir(exist_ok=True)
    (folder / "held" / "h.jsonl").write_text('{"text": "kept apart"}\n')
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus(live_config(data=folder / "a.jsonl", held_out=folder / "held").data, lanes=lanes)


def lane_of(corpus: Corpus, tokenizer: Tokenizer, index: int = 0, *, lanes: int = 4, seed: int = 0,
            repeat: bool = True, context_length: int = 16) -> Lane:  # fmt: skip
    return Lane(index, lanes=lanes, corpus=corpus, tokenizer=tokenizer, context_length=context_length, seed=seed,
                repeat=repeat)  # fmt: skip


def test_special_tokens_by_family(tokenizers):
    ids = {name: tokenizer.encode("<bos><eos><cls><sep>") for name, tokenizer in tokenizers.items()}
    assert [tokenizers["gpt"].bos, tokenizers["gpt"].eos] == ids["gpt"][:2] == tokenizers["gpt"].special_ids
    assert tokenizers["bert"].bos == ids["bert"][-2]
    assert tokenizers["bert"].eos == ids["bert"][-1]
    assert len(tokenizers["bert"].special_ids) == 3
    assert tokenizers["bare"].special_ids == []


@pytest.mark.parametrize("kind", ["gpt", "bert", "bare", "end"])
def test_packing_loses_and_adds_nothing_but_special_tokens(tokenizers, kind):
    tokenizer = tokenizers[kind]
    packer = Packer(tokenizer, context_length=10)
    expected: list[int] = []
    for text in [*TEXTS[:5], "", TEXTS[5]]:
        packer.add(text)
        ids = tokenizer.encode(text)
        expected += [*ids, *([tokenizer.eos] if ids and tokenizer.eos is not None else [])]
    contexts = packer.take(1000)
    assert contexts.shape[1] == 10
    if tokenizer.bos is not None:
        assert (contexts[:, 0] == tokenizer.bos).all()
        contexts = contexts[:, 1:]
    assert contexts.flatten().tolist() + packer.tokens == expected
    assert len(packer.tokens) < 10


def test_a_lane_reads_its_own_documents_once_an_epoch_in_a_new_order(tmp_path, tokenizers):
    corpus = corpus_of(tmp_path, TEXTS, lanes=4)
    tokenizer = tokenizers["gpt"]
    own = Counter(token for text in TEXTS[1::4] for token in tokenizer.encode(text))
    n_tokens = sum(own.values()) + len(TEXTS[1::4])
    lane = lane_of(corpus, tokenizer, 1, context_length=n_tokens + 1)  # a context is an epoch
    first, second = lane.contexts(2)[:, 1:]
    for epoch in (first, second):
        assert Counter(token for token in epoch.tolist() if token != tokenizer.eos) == own
    assert not torch.equal(first, second)
    other = lane_of(corpus, tokenizer, 1, context_length=n_tokens + 1, seed=1).contexts(1)[0, 1:]
    assert not torch.equal(first, other)
    assert torch.equal(lane_of(corpus, tokenizer, 1, context_length=n_tokens + 1).contexts(1)[0, 1:], first)


def test_all_lanes_together_read_every_document_once(tmp_path, tokenizers):
    corpus = corpus_of(tmp_path, TEXTS, lanes=3)
    tokenizer = tokenizers["bare"]
    seen: Counter[int] = Counter()
    for index in range(3):
        lane = lane_of(corpus, tokenizer, index, lanes=3, repeat=False, context_length=4)
        seen.update(lane.contexts(10_000).flatten().tolist())
        assert lane.has_ended
        seen.update(lane.state()["tokens"].tolist())
    assert seen == Counter(token for text in TEXTS for token in tokenizer.encode(text))


@given(asked=st.lists(st.integers(1, 7), min_size=1, max_size=8), cut=st.integers(0, 7))
def test_a_cursor_goes_on_where_it_was(tmp_path_factory, tokenizers, asked, cut):
    corpus = corpus_of(tmp_path_factory.mktemp("cursor"), TEXTS, lanes=4)
    whole = lane_of(corpus, tokenizers["gpt"]).contexts(sum(asked))
    lane, parts = lane_of(corpus, tokenizers["gpt"]), []
    for number, n in enumerate(asked):
        if number == cut:
            state = lane.state()
            lane = lane_of(corpus, tokenizers["gpt"])
            lane.load_state(state)
        parts.append(lane.contexts(n))
    assert torch.equal(torch.cat(parts), whole)


def test_held_out_documents_are_never_read(tmp_path, tokenizers):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    corpus = Corpus(live_config(data=tmp_path / "a.jsonl").data, lanes=2)
    held_out = list(corpus.held_out_texts())
    tokenizer = tokenizers["bare"]
    read = []
    for index in range(2):
        lane = lane_of(corpus, tokenizer, index, lanes=2, repeat=False, context_length=4)
        read += [*lane.contexts(10_000).flatten().tolist(), *lane.state()["tokens"].tolist()]
    kept = [text for text in TEXTS if text not in held_out]
    assert Counter(read) == Counter(token for text in kept for token in tokenizer.encode(text))


def test_without_repeat_a_lane_ends_at_its_last_full_context(tmp_path, tokenizers):
    lane = lane_of(corpus_of(tmp_path, TEXTS, lanes=4), tokenizers["gpt"], repeat=False)
    assert not lane.has_ended
    n = len(lane.contexts(10_000))
    assert n > 0
    assert lane.has_ended
    assert len(lane.contexts(3)) == 0


def test_what_is_trainable(tokenizers):
    gpt = tokenizers["gpt"]
    ids = torch.tensor([[gpt.bos, 9, gpt.eos, 10], [8, gpt.eos, 9, 9]])
    assert trainable(ids, gpt).tolist() == [[False, True, False, True], [False, False, True, True]]


def shortest_works(corpus: Corpus, tokenizer: Tokenizer, lanes: int, context_length: int) -> bool:
    """Whether every lane fills a context, by reading everything."""
    recut = corpus.recut(lanes)
    return all(
        len(lane_of(recut, tokenizer, index, lanes=lanes, repeat=False, context_length=context_length).contexts(1))
        for index in range(lanes)
    )


@settings(max_examples=25)
@given(n=st.integers(3, 30), lanes=st.sampled_from([1, 2, 4, 8, 16]), context_length=st.sampled_from([8, 30, 80, 300]),
       n_ranks=st.sampled_from([1, 2]), as_text=st.booleans())  # fmt: skip
def test_short_lanes_are_refused_with_the_largest_number_that_works(
    tmp_path_factory, tokenizers, n, lanes, context_length, n_ranks, as_text
):
    folder = tmp_path_factory.mktemp("short")
    corpus = corpus_of(folder, TEXTS[:n], lanes=lanes)
    if as_text:
        (folder / "a.txt").write_text("\n".join(TEXTS[:n]))
        corpus = Corpus(live_config(data=folder / "a.txt", held_out=folder / "held").data, lanes=lanes)
    tokenizer = tokenizers["gpt"]
    working = [count for count in (16, 8, 4, 2, 1) if shortest_works(corpus, tokenizer, count, context_length)]

    def check() -> None:
        check_lanes(corpus, tokenizer, lanes=lanes, context_length=context_length, batch_tokens=16, n_ranks=n_ranks)

    if lanes in working:
        check()
        return
    with pytest.raises(UserError) as caught:
        check()
    fewer = [count for count in working if count < lanes and count % n_ranks == 0]
    expected = f"largest that works is harvest.lanes={fewer[0]};" if fewer else "for any number of lanes"
    assert expected in str(caught.value)


def test_a_lane_of_empty_documents_says_so(tmp_path, tokenizers):
    corpus = corpus_of(tmp_path, ["", "words here", "", "words there"], lanes=2)
    with pytest.raises(UserError, match="documents hold no text"):
        lane_of(corpus, tokenizers["gpt"], 0, lanes=2).contexts(1)


@given(max_tokens=st.integers(1, 400))
def test_halves_of_held_out_contexts(tokenizers, max_tokens):
    tokenizer = tokenizers["gpt"]

    def contexts() -> HeldOutContexts:
        return HeldOutContexts(iter(TEXTS[:20]), tokenizer=tokenizer, context_length=16)

    calibration, evaluation = (contexts().of_half(half, max_tokens=max_tokens) for half in HALVES)
    assert all(index % 2 == 0 for index in calibration)
    assert all(index % 2 == 1 for index in evaluation)
    packed = contexts()
    counts = [
        int(trainable(packed[index][None], tokenizer).sum())
        for index in packed.of_half("calibration", max_tokens=10**6)
    ]
    needed = next((n for n in range(len(counts) + 1) if sum(counts[:n]) >= max_tokens), len(counts))
    assert len(calibration) == needed


def test_held_out_text_of_less_than_two_contexts(tokenizers):
    with pytest.raises(UserError, match="shorter than two contexts"):
        HeldOutContexts(iter(TEXTS[:1]), tokenizer=tokenizers["gpt"], context_length=64)
