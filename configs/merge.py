"""Add a share of what one adapter learned to another that began at the same checkpoint (task arithmetic, arXiv 2212.04089).

    python configs/merge.py BASE LEARNED START SHARE OUT        # writes BASE + SHARE x (LEARNED - START) into OUT

Each is a checkpoint folder, or the name of a shipped adapter. The [FT] marker, which only fine-tuning trains, is LEARNED's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from icae import ICAE
from icae.base import Base
from icae.checkpoint import find_checkpoint
from icae.objectives import Marker


def merge(base: str, learned: str, start: str, share: float, out: Path, *, on: Base | None = None) -> Path:
    """Write the merged adapter."""
    merged, taught, began = (ICAE.from_pretrained(find_checkpoint(name), base=on) for name in (base, learned, start))
    theirs, before = taught.adapter_tensors(), began.adapter_tensors()
    with torch.no_grad():
        for name, tensor in merged.adapter_tensors().items():
            tensor += share * (theirs[name] - before[name])
        merged.markers[Marker.FT] = taught.markers[Marker.FT]
    merged.forget_hash()
    merged.save_pretrained(out)
    return out


if __name__ == "__main__":
    *names, share, out = sys.argv[1:]
    print(merge(*names, float(share), Path(out)))
