"""Put a trained checkpoint among the adapters that ship: float16, with its settings and its curve, and no optimizer.

    python configs/ship.py runs/accelerator/kv-4x smollm2-135m-kv-4x

Then measure it (`icae evaluate ... --save results/NAME.json`) and make its card (`python docs/make.py`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from icae import ICAE

ADAPTERS = Path(__file__).parent.parent / "src" / "icae" / "adapters"


def ship(run: Path, name: str) -> Path:
    """Write adapter, settings and training curve of a run (or of one of its checkpoints) into the package."""
    settings = next(folder / "train_config.json" for folder in (run, run.parent) if (folder / "train_config.json").exists())
    state = json.loads((run / "trainer_state.json").read_text())
    folder = ADAPTERS / name
    ICAE.from_pretrained(run).save_pretrained(folder, dtype=torch.float16)
    (folder / "train_config.json").write_text(settings.read_text())
    kept = {key: state[key] for key in ("global_step", "max_steps", "log_history")}
    (folder / "trainer_state.json").write_text(json.dumps(kept, indent=1) + "\n")
    return folder


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), sys.argv[2]))
