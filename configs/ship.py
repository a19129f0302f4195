"""Put a trained checkpoint among the adapters that ship: float16, with its settings and its curves, and no optimizer.

    python configs/ship.py runs/accelerator/kv-4x smollm2-135m-kv-4x

Then measure it (`icae evaluate ... --save results/NAME.json`) and make its card (`python docs/make.py`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from icae import ICAE
from icae.checkpoint import find_checkpoint

ADAPTERS = Path(__file__).parent.parent / "src" / "icae" / "adapters"


def ship(run: Path, name: str) -> Path:
    """Write adapter, settings and training curve of a run (or of one of its checkpoints) into the package."""
    settings = next(folder / "train_config.json" for folder in (run, run.parent) if (folder / "train_config.json").exists())
    state = json.loads((run / "trainer_state.json").read_text())
    init, folder = json.loads(settings.read_text())["init"], ADAPTERS / name
    if init is not None:
        before = json.loads((find_checkpoint(init) / "trainer_state.json").read_text())["log_history"]
        state["log_history"] = going_on(before, state["log_history"])
    ICAE.from_pretrained(run).save_pretrained(folder, dtype=torch.float16)
    shipped = ICAE.from_pretrained(folder).origin.adapter  # its reports in results/ carry it
    (folder / "train_config.json").write_text(settings.read_text())
    kept = {key: state[key] for key in ("global_step", "max_steps", "log_history")} | {"adapter": shipped}
    (folder / "trainer_state.json").write_text(json.dumps(kept, indent=1) + "\n")
    return folder


def going_on(before: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the log of a stage behind that of the stage before, its counts going on from there."""
    counts = {key: max(line.get(key, 0) for line in before) for key in ("step", "context_tokens", "minutes")}
    return before + [line | {key: line[key] + count for key, count in counts.items() if key in line} for line in lines]


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), sys.argv[2]))
