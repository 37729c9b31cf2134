"""Settings of what the dictionary is: nested or not, and what is trained of its encoder."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(kw_only=True, slots=True)
class NestingConfig:
    """Whether prefixes of the dictionary must reconstruct by themselves; see the subclass."""

    name: str

    def problems(self) -> list[str]:
        return []


@dataclass(kw_only=True, slots=True)
class MatryoshkaConfig(NestingConfig):
    """The first features reconstruct alone, too, and with more and more of the rest (arXiv 2503.17547)."""

    prefixes: list[float]
    """Shares of the features in each prefix, ascending; the last is 1."""

    def problems(self) -> list[str]:
        given = f"nesting.prefixes={[float(f'{share:g}') for share in self.prefixes]}"
        if not self.prefixes or self.prefixes[-1] != 1:
            return [f"{given}: the last prefix must be 1, the whole dictionary."]
        if self.prefixes[0] <= 0 or any(a >= b for a, b in pairwise(self.prefixes)):
            return [f"{given}: must be above 0 and ascend."]
        if len(self.prefixes) == 1:
            return [f"{given}: one prefix nests nothing. Add smaller ones or choose nesting=none."]
        return []


@dataclass(kw_only=True, slots=True)
class ParametrisationConfig:
    """What is trained of the encoder: `free` rows, or `aligned` ones, whose product with the decoder's row is 1."""

    name: str
