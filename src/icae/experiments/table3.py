"""Table 3: normal, patterned and random text, which tell whether the encoder leans on knowing the language.

Patterned text is normal text with each token id one higher (arXiv 2307.06945, section 3.2.1); random text is drawn from all ids that are
not special.
"""

from __future__ import annotations

import numpy as np

from icae.base import Base
from icae.config import KINDS
from icae.experiments.context import Context, hashes
from icae.experiments.reading import bleus, losses, read_back
from icae.experiments.table import Cell, Column, Table, mean

NEEDS = ("main", "embedding", "text")
QUICK = {"samples": 8}
COLUMNS = [
    Column("kind", "slots"),
    Column("content", "text"),
    Column("length", "tokens"),
    Column("samples", "samples"),
    Column("loss", "loss, nats a token"),
    Column("accuracy", "token accuracy"),
    Column("bleu", "BLEU", 1),
]


def run(context: Context, *, samples: int = 100, length: int = 128) -> Table:
    """Read all three back, by the main adapter and by that of the other kind."""
    notes = context.text_note()
    (length,) = context.within([length], context.longest, "no document is longer", notes)
    normal = context.windows(length, samples)
    contents = {
        "normal": normal,
        "patterned": [patterned(context.base, ids) for ids in normal],
        "random": [random_ids(context.base, length, [context.seed, 3, i]) for i in range(samples)],
    }
    rows: list[dict[str, Cell]] = []
    adapters = [context.main, context.adapter("embedding")]
    absent = next(kind for kind in KINDS if kind != context.main.config.kind)
    for model in adapters:
        for name, texts in contents.items():
            row: dict[str, Cell] = {"kind": model.config.kind if model else absent, "content": name, "length": length, "samples": samples}
            if model is not None:
                readings = read_back(context, model, texts)
                row |= {
                    "loss": mean(losses(readings)),
                    "accuracy": mean([float(r.hits.mean()) for r in readings]),
                    "bleu": mean(bleus(model, readings, texts)),
                }
            rows.append(row)
    if None in adapters:
        notes.append(f"No adapter with {absent} slots for this base: give --embedding FOLDER.")
    return Table("table3", COLUMNS, rows, notes, hashes([w for texts in contents.values() for w in texts]))


def _ordinary(base: Base) -> np.ndarray:
    """Return all ids that are not special, in order."""
    special = set(base.tokenizer.all_special_ids) | set(base.tokenizer.get_added_vocab().values())
    return np.array([i for i in range(len(base.tokenizer)) if i not in special])


def patterned(base: Base, ids: list[int]) -> list[int]:
    """Return each id's successor among the ordinary ids; the last one's is the first."""
    ordinary = _ordinary(base)
    return ordinary[np.searchsorted(ordinary, np.asarray(ids) + 1) % len(ordinary)].tolist()


def random_ids(base: Base, length: int, seed: list[int]) -> list[int]:
    """Draw ordinary ids, all alike likely."""
    return np.random.default_rng(seed).choice(_ordinary(base), length).tolist()
