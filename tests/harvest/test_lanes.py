"""Lanes: what each reads and in which order, packing, cursors, and corpora that are too short."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_train.config import ModelConfig
from sae_train.errors import UserError
from sae_train.harvest.corpus import Corpus, Part
from sae_train.harvest.filter import trainable
from sae_train.harvest.held_out import HALVES, HeldOutContexts
from sae_train.harvest.lanes import Lane, Packer, check_lanes
from sae_train.harvest.language_model import Tokenizer
from tools.tiny_models import live_config, save_tokenizer, sentences

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


def corpus_of(folder: Path, texts: list[str]) -> Corpus:
    """Return a corpus that holds out none of `texts`."""
    (folder / "held").mkdir(exist_ok=True)
    (folder / "held" / "h.jsonl").write_text('{"text": "kept apart"}\n')
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus(live_config(data=folder / "a.jsonl", held_out=folder / "held").data)


def lane_of(corpus: Corpus, tokenizer: Tokenizer, index: int = 0, *, lanes: int = 4, seed: int = 0,
            repeat: bool = True, context_length: int = 20) -> Lane:  # fmt: skip
    stretches = corpus.stretches(lanes, context_length=context_length, tokenizer=tokenizer)
    return Lane(index, stretches=stretches, corpus=corpus, tokenizer=tokenizer, context_length=context_length,
                seed=seed, repeat=repeat)  # fmt: skip


def own_parts(corpus: Corpus, tokenizer: Tokenizer, index: int, *, lanes: int, context_length: int) -> list[Part]:
    """Return the parts of a lane, in no particular order."""
    stretches = corpus.stretches(lanes, context_length=context_length, tokenizer=tokenizer)
    segments = stretches.segments(index).tolist()
    return [corpus.part(*segment, window=stretches.window) for segment in segments if not corpus.holds_out(segment[0])]


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


def test_a_lane_reads_its_own_text_once_an_epoch_in_a_new_order(tmp_path, tokenizers):
    corpus, tokenizer = corpus_of(tmp_path, TEXTS), tokenizers["gpt"]
    parts = own_parts(corpus, tokenizer, 1, lanes=4, context_length=100)
    own = Counter(token for part in parts for token in tokenizer.encode(part.text))
    n_tokens = sum(own.values()) + sum(part.is_end for part in parts)
    expected = own + Counter({tokenizer.eos: sum(part.is_end for part in parts)})
    lane = lane_of(corpus, tokenizer, 1, context_length=100)
    read = lane.contexts(2 * n_tokens // 99 + 1)[:, 1:].flatten()
    first, second = read[:n_tokens], read[n_tokens : 2 * n_tokens]
    assert len(parts) > 3
    for epoch in (first, second):
        assert Counter(epoch.tolist()) == expected
    assert not torch.equal(first, second)
    other = lane_of(corpus, tokenizer, 1, context_length=100, seed=1).contexts(1)[0, 1:]
    assert not torch.equal(first[:99], other)
    assert torch.equal(lane_of(corpus, tokenizer, 1, context_length=100).contexts(1)[0, 1:], first[:99])


@pytest.mark.parametrize("lanes", [1, 3, 7])
def test_all_lanes_together_read_every_document_once(tmp_path, tokenizers, lanes):
    corpus, tokenizer = corpus_of(tmp_path, TEXTS), tokenizers["bare"]
    seen: Counter[int] = Counter()
    expected: Counter[int] = Counter()
    for index in range(lanes):
        lane = lane_of(corpus, tokenizer, index, lanes=lanes, repeat=False, context_length=4)
        seen.update(lane.contexts(10_000).flatten().tolist())
        assert lane.has_ended
        seen.update(lane.state()["tokens"].tolist())
        for part in own_parts(corpus, tokenizer, index, lanes=lanes, context_length=4):
            expected.update(tokenizer.encode(part.text))
    assert seen == expected
    if lanes == 1:
        assert seen == Counter(token for text in TEXTS for token in tokenizer.encode(text))


@given(asked=st.lists(st.integers(1, 7), min_size=1, max_size=8), cut=st.integers(0, 7))
def test_a_cursor_goes_on_where_it_was(tmp_path_factory, tokenizers, asked, cut):
    corpus = corpus_of(tmp_path_factory.mktemp("cursor"), TEXTS)
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
    corpus = Corpus(live_config(data=tmp_path / "a.jsonl").data)
    held_out = [part.text for part in corpus.held_out_parts()]
    read = [part.text for index in range(2)
            for part in own_parts(corpus, tokenizers["bare"], index, lanes=2, context_length=4)]  # fmt: skip
    kept = [text for text in TEXTS if text not in held_out]
    assert 2 <= len(held_out) == len(TEXTS) - len(kept)
    assert Counter("".join(read)) == Counter("".join(kept))


def test_without_repeat_a_lane_ends_at_its_last_full_context(tmp_path, tokenizers):
    lane = lane_of(corpus_of(tmp_path, TEXTS), tokenizers["gpt"], repeat=False)
    assert not lane.has_ended
    n = len(lane.contexts(10_000))
    assert n > 0
    assert lane.has_ended
    assert len(lane.contexts(3)) == 0


def test_what_is_trainable(tokenizers):
    gpt = tokenizers["gpt"]
    ids = torch.tensor([[gpt.bos, 9, gpt.eos, 10], [8, gpt.eos, 9, 9]])
    assert trainable(ids, gpt).tolist() == [[False, True, False, True], [False, False, True, True]]


def every_lane_fills_a_context(corpus: Corpus, tokenizer: Tokenizer, lanes: int, context_length: int) -> bool:
    """Whether every lane fills a context, by reading everything."""
    body = context_length - 1
    for index in range(lanes):
        parts = own_parts(corpus, tokenizer, index, lanes=lanes, context_length=context_length)
        if sum(len(tokenizer.encode(part.text)) + part.is_end for part in parts if part.text) < body:
            return False
    return True


@settings(max_examples=25)
@given(n=st.integers(3, 30), lanes=st.sampled_from([1, 2, 4, 8, 16]), context_length=st.sampled_from([8, 30, 80, 300]),
       n_ranks=st.sampled_from([1, 2]), as_text=st.booleans())  # fmt: skip
def test_short_lanes_are_refused_with_the_largest_number_that_works(
    tmp_path_factory, tokenizers, n, lanes, context_length, n_ranks, as_text
):
    folder = tmp_path_factory.mktemp("short")
    corpus = corpus_of(folder, TEXTS[:n])
    if as_text:
        (folder / "a.txt").write_text("\n".join(TEXTS[:n]))
        corpus = Corpus(live_config(data=folder / "a.txt", held_out=folder / "held").data)
    tokenizer = tokenizers["gpt"]
    working = [n for n in (16, 8, 4, 2, 1) if every_lane_fills_a_context(corpus, tokenizer, n, context_length)]

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


def whole(text: str) -> Part:
    return Part(text, is_end=True)


@given(max_tokens=st.integers(1, 400))
def test_halves_of_held_out_contexts(tokenizers, max_tokens):
    tokenizer = tokenizers["gpt"]

    def contexts() -> HeldOutContexts:
        return HeldOutContexts(map(whole, TEXTS[:20]), tokenizer=tokenizer, context_length=16)

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
        HeldOutContexts(map(whole, TEXTS[:1]), tokenizer=tokenizers["gpt"], context_length=64)
