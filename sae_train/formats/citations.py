"""Papers of the methods, as BibTeX for model cards.

Authors and titles are there where docs/methods.md or its sources hold them. The others have their arXiv number alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """A paper on arXiv. `PAPERS` lists them, and `bibtex` writes them."""

    eprint: str
    method: str
    """Name of the method in words."""
    authors: tuple[str, ...] = ()
    title: str | None = None

    def entry(self) -> str:
        """Return the BibTeX entry."""
        values = {
            "title": None if self.title is None else self.title.replace("&", r"\&"),
            "author": " and ".join(self.authors) or None,
            "year": f"20{self.eprint[:2]}",
            "eprint": self.eprint,
            "archivePrefix": "arXiv",
            "note": self.method if self.title is None else None,
        }
        lines = [f"  {key} = {{{value}}}," for key, value in values.items() if value is not None]
        return "\n".join([f"@misc{{arxiv:{self.eprint},", *lines, "}"])


_CHOICE = Paper(
    eprint="2411.02124",
    method="Mutual Choice and Feature Choice",
    authors=("Kola Ayonrinde",),
    title="Adaptive Sparse Allocation with Mutual Choice & Feature Choice SAEs",
)
PAPERS = {
    "mutual_choice": _CHOICE,
    "feature_choice": _CHOICE,
    "batch_topk": Paper(eprint="2412.06410", method="BatchTopK", authors=("Bussmann", "Leask", "Nanda")),
    "topk": Paper(eprint="2406.04093", method="TopK"),
    "gradient": Paper(
        eprint="2411.10397",
        method="Gradient SAE",
        authors=("Olmo", "Wilson", "Forsey", "Hepner", "Howe", "Wingate"),
    ),
    "jumprelu": Paper(eprint="2407.14435", method="JumpReLU"),
    "gated": Paper(eprint="2404.16014", method="Gated SAE"),
    "p_anneal": Paper(eprint="2408.00113", method="p-anneal"),
    "temporal_mask": Paper(eprint="2510.08855", method="Adaptive Temporal Masking", authors=("T. Ed Li", "Junyu Ren")),
    "matryoshka": Paper(eprint="2503.17547", method="Matryoshka SAE"),
}
"""Papers by the name of the sparsifier, or of the nesting."""


def bibtex(methods: Iterable[str]) -> str:
    """Return the entries of the papers of some methods, each once. Methods without a paper here are left out."""
    papers = {PAPERS[name].eprint: PAPERS[name] for name in methods if name in PAPERS}
    return "\n\n".join(paper.entry() for paper in papers.values())
