"""Write activations of the bundled model to files, for bench_quality.py and study_sparsifiers.py.

    python scripts/bundled_activations.py --out OUT [--tokens 400000]

It writes OUT/train and OUT/held_out for `harvest=tensors`, filtered as in a run, in the model's own scale. The pool
mixes the training rows in the order of a live run with data.seed=0. Held-out rows are blocks of 256, in turn of either
half (quality_score.py).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from quality_score import BLOCK
from safetensors.torch import save_file
from torch import Tensor

from sae_train.cli.compose import compose_config
from sae_train.harvest.build import build_stream
from sae_train.harvest.held_out import HALVES
from sae_train.harvest.stream import Stream
from sae_train.ranks.interface import Solo

HELD_OUT = 20_000
"""Rows of each half, at most."""
BATCH = 2048


def started(*, tokens: int = 100_000) -> Stream:
    """Return the stream of a run on the bundled model, ready for its first batch."""
    config = compose_config([f"tokens={tokens}", f"batch_tokens={BATCH}", "tracking=none"])
    stream = build_stream(config.source, ranks=Solo())
    stream.start()
    return stream


def save(rows_ND: Tensor, folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({"activations": rows_ND.contiguous()}, folder / "rows.safetensors")


def write_train(stream: Stream, folder: Path, *, tokens: int) -> None:
    """Write the first `tokens` training rows (whole batches of them)."""
    (site,) = stream.scalings
    scale, centre_D = stream.scalings[site].scale, stream.scalings[site].centre_D
    batches = (stream.batch(step)[site].x_ND for step in range(tokens // BATCH))
    save(torch.cat([(x_ND * scale + centre_D).float() for x_ND in batches]), folder)


def write_held_out(stream: Stream, folder: Path) -> None:
    """Write held-out rows, the halves as blocks by turns."""
    (site,) = stream.scalings
    halves = [stream.held_out.batches(half, max_tokens=HELD_OUT, ranks=Solo()) for half in HALVES]
    rows = [torch.cat([batch.sites[site].raw_ND for batch in batches]) for batches in halves]
    n_blocks = min(map(len, rows)) // BLOCK
    turns = torch.stack([part[: n_blocks * BLOCK].view(n_blocks, BLOCK, -1) for part in rows], dim=1)
    save(turns.flatten(0, 2), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=400_000)
    args = parser.parse_args()
    for part in ("train", "held_out"):
        if (args.out / part).exists():
            parser.error(f"--out: {args.out / part} is there already")
    stream = started(tokens=args.tokens)
    write_train(stream, args.out / "train", tokens=args.tokens)
    write_held_out(stream, args.out / "held_out")


if __name__ == "__main__":
    main()
