"""Settings of the dictionary: nested or not, and how its encoder is parametrised."""

from dataclasses import dataclass
from itertools import pairwise

from sae_train.config.ranges import Settings


@dataclass(kw_only=True, slots=True)
class NestingConfig(Settings):
    """Whether prefixes of the dictionary must reconstruct alone; see the subclass."""

    name: str


@dataclass(kw_only=True, slots=True)
class MatryoshkaConfig(NestingConfig):
    """The first features must also reconstruct alone, and with more and more of the rest (arXiv 2503.17547)."""

    prefixes: list[float]
    """Sizes of the prefixes, as ascending shares of the features above 0. The last is 1."""

    def conflicts(self) -> list[str]:
        given = f"nesting.prefixes={[float(f'{share:g}') for share in self.prefixes]}"
        if not self.prefixes or self.prefixes[-1] != 1:
            return [f"{given}: the last prefix must be 1, the whole dictionary."]
        if self.prefixes[0] <= 0 or any(a >= b for a, b in pairwise(self.prefixes)):
            return [f"{given}: must be above 0 and ascend."]
        if len(self.prefixes) == 1:
            return [f"{given}: one prefix nests nothing. Add smaller ones or choose nesting=none."]
        return []


@dataclass(kw_only=True, slots=True)
class ParametrisationConfig(Settings):
    """How the encoder is parametrised: `free` rows, or `aligned` rows, whose product with the decoder's row is 1."""

    name: str
