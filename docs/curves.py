"""Draw docs/curves.png, the shipped adapters' training, from the trainer_state.json beside each. `python docs/curves.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).parent.parent


OVER = {"context_tokens": "context tokens", "minutes": "minutes"}
"""What a loss is drawn over, where the log has it; else over updates."""


def main() -> None:
    """Draw an adapter's panels: every logged training loss, their running mean, and the held-out losses."""
    panels = []
    for file in sorted((ROOT / "src/icae/adapters").glob("*/trainer_state.json")):
        lines = json.loads(file.read_text())["log_history"]
        panels += [(file, lines, key) for key in OVER if key in lines[0]] or [(file, lines, "step")]
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis, *panel)
    figure.savefig(ROOT / "docs" / "curves.png", dpi=110, metadata={"Software": None})


def draw(axis: Any, file: Path, lines: list[dict[str, Any]], over: str) -> None:
    """Draw one panel from the lines of a log."""
    answers = json.loads((file.parent / "train_config.json").read_text())["objective"] == "instruct"
    for key, label, style in (
        ("loss", "training", {"alpha": 0.3}),
        ("eval_loss", f"held out{', responses alone' if answers else ''}", {"marker": "o"}),
    ):
        places = [line[over] for line in lines if key in line]
        losses = [line[key] for line in lines if key in line]
        if losses:
            (drawn,) = axis.plot(places, losses, label=label, **style)
        if key == "loss":
            smooth = [sum(losses[max(0, i - 4) : i + 1]) / len(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
            axis.plot(places, smooth, color=drawn.get_color(), label="mean of five")
    axis.set(title=file.parent.name, xlabel=OVER.get(over, "update"), ylabel="loss (nats a token)")
    axis.title.set_fontsize(9)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


if __name__ == "__main__":
    main()
