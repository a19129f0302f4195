"""Draw docs/curves.png, the shipped adapters' last stages of training, from the trainer_state.json beside each. `python docs/curves.py`."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Draw a panel an adapter: every logged training loss, their running mean, and the held-out losses."""
    states = sorted((ROOT / "src/icae/adapters").glob("*/trainer_state.json"))
    figure = Figure(figsize=(5 * len(states), 3.6), layout="constrained")
    for axis, file in zip(figure.subplots(1, len(states), squeeze=False)[0], states, strict=True):
        lines = json.loads(file.read_text())["log_history"]
        answers = json.loads((file.parent / "train_config.json").read_text())["objective"] == "instruct"
        for key, label, style in (
            ("loss", "training", {"alpha": 0.3}),
            ("eval_loss", f"held out{', responses alone' if answers else ''}", {"marker": "o"}),
        ):
            steps = [line["step"] for line in lines if key in line]
            losses = [line[key] for line in lines if key in line]
            if losses:
                (drawn,) = axis.plot(steps, losses, label=label, **style)
            if key == "loss":
                smooth = [sum(losses[max(0, i - 4) : i + 1]) / len(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
                axis.plot(steps, smooth, color=drawn.get_color(), label="mean of five")
        axis.set(title=file.parent.name, xlabel="update", ylabel="loss (nats a token)")
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "curves.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
