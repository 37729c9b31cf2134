"""Raw activations of one lane: its text, run through the language model, without the tokens that are never trained on.

Nothing here depends on a scaling or a pool. The outlier limit comes from a calibration on such rows, so it is applied
later, by the reader. These rows hold every trainable token, and so will a store that is written from them.
Letters: B contexts, T positions, N rows, D d_model.
"""

from dataclasses import dataclass

from torch import Tensor

from sae_train.errors import DataError
from sae_train.harvest.filter import check_finite, trainable
from sae_train.harvest.lanes import Lane
from sae_train.harvest.language_model import LanguageModel, Tokenizer
from sae_train.harvest.meter import Meter

_FRUITLESS_FORWARDS = 200
_CONTEXTS_COUNTED = 64
"""Contexts that are tokenised at a time to count the tokens that are left."""


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of one forward pass, and the lane's place in its text after them. `RawRows` makes it."""

    raw: dict[str, Tensor]
    """[N, D] activations of the trainable tokens by site, in the language model's dtype, all finite."""
    gradients: dict[str, Tensor]
    """[N, D] gradients of the language model's loss at the same tokens by site. Empty where none are harvested."""
    cursor: dict[str, Tensor]
    is_last: bool
    """Whether the text ends here."""

    def __len__(self) -> int:
        """Return the number of trainable tokens, N."""
        return len(next(iter(self.raw.values())))


class Patience:
    """A count of forward passes in a row that gave nothing. It ends a lane that would be read for ever.

    `RawRows` has one, and `LiveLane` has one for each site.
    """

    def __init__(self, reader: str, *, lacking: str) -> None:
        """Args:
        reader: the lane, or the lane and the site, for the message.
        lacking: what the passes did not give, and what to do, for the message.
        """
        self._reader, self._lacking, self._fruitless = reader, lacking, 0

    def see(self, n_rows: int) -> None:
        """Count a forward pass of which `n_rows` rows were kept.

        Raises:
            DataError: 200 passes in a row gave no row.
        """
        self._fruitless = 0 if n_rows else self._fruitless + 1
        if self._fruitless == _FRUITLESS_FORWARDS:
            raise DataError(f"{self._reader}: {self._fruitless} forward passes in a row gave {self._lacking}")


class RawRows:
    """The raw rows of one lane, block after block.

    `LiveStream` creates one for each of its lanes, and `LiveLane` reads it. Text, tokenizer and language model belong
    to one thread at a time.

    Attributes:
        lane: index of the lane.
    """

    def __init__(self, text: Lane, *, language_model: LanguageModel, tokenizer: Tokenizer, contexts_per_forward: int,
                 reads_gradients: bool, meter: Meter | None = None) -> None:  # fmt: skip
        """Args:
        text: the lane's text.
        language_model: gives the activations of its sites.
        tokenizer: gives the special tokens.
        contexts_per_forward: contexts of a forward pass.
        reads_gradients: whether blocks hold gradients.
        meter: receives the time of forward passes.
        """
        self.lane = text.index
        self._text, self._language_model, self._tokenizer = text, language_model, tokenizer
        self._contexts_per_forward, self._reads_gradients = contexts_per_forward, reads_gradients
        self._meter = meter or Meter()
        self._patience = Patience(f"lane {text.index}", lacking="no token that the filters keep. Look at its text: it "
                                  "may be made of special tokens.")  # fmt: skip

    def next(self) -> Block | None:
        """Return the block of the next contexts, or None where the text has ended.

        Raises:
            DataError: activations that are not finite, a tokenizer of another model, or text of special tokens only.
        """
        ids_BT = self._text.contexts(self._contexts_per_forward)
        if not len(ids_BT):
            return None
        largest = int(ids_BT.max())
        if largest >= self._language_model.vocab:
            raise DataError(
                f"the tokenizer gives token {largest}, the language model has {self._language_model.vocab} tokens. "
                "Use the tokenizer that belongs to the model."
            )
        with self._meter.timed("harvested"):
            raw, gradients = self._harvest(ids_BT)
        n_rows = len(next(iter(raw.values())))
        self._meter.count("harvested", n_rows)
        self._patience.see(n_rows)
        return Block(raw, gradients, self._text.state(), self._text.has_ended)

    def _harvest(self, ids_BT: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return activations and gradients of the trainable tokens by site; no gradients where none are read."""
        model, gradients = self._language_model, dict[str, Tensor]()
        if self._reads_gradients:
            raw, gradients = model.activations_and_gradients(ids_BT)
        else:
            raw = model.activations(ids_BT)
        place_N = trainable(ids_BT, self._tokenizer).flatten().nonzero()[:, 0].to(model.device)
        raw = {label: raw_BTD.flatten(0, 1)[place_N] for label, raw_BTD in raw.items()}
        gradients = {label: gradient_BTD.flatten(0, 1)[place_N] for label, gradient_BTD in gradients.items()}
        check_finite({label: [raw_ND, *([gradients[label]] if gradients else [])] for label, raw_ND in raw.items()},
                     language_model=model)  # fmt: skip
        return raw, gradients

    @property
    def has_ended(self) -> bool:
        """Whether the text holds no further context."""
        return self._text.has_ended

    def cursor(self) -> dict[str, Tensor]:
        """Return the place in the text as CPU tensors."""
        return self._text.state()

    def go_to(self, cursor: dict[str, Tensor]) -> None:
        """Continue from a place in the text, given by `cursor` or by a block."""
        self._text.load_state(cursor)

    def epochs(self, cursor: dict[str, Tensor]) -> float:
        """Return the number of times that the text was read at a cursor, in epochs."""
        return self._text.epochs(cursor)

    def count_rest(self) -> int:
        """Return the number of trainable tokens after the current place, and read the text to its end."""
        total = 0
        while len(ids_BT := self._text.contexts(_CONTEXTS_COUNTED)):
            total += int(trainable(ids_BT, self._tokenizer).sum())
        return total
