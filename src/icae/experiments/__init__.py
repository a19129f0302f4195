"""The paper's evaluation (ICAE, arXiv 2307.06945): one file a table or figure, each with `run(context, **settings) -> Table`.

context.py   what is measured: base, adapters, texts, questions      runner.py    one after the other, resumable, onto disk
reading.py, following.py, asking.py                                  what several of them measure, computed once
table.py     what comes out                                          paper.py     the paper's figures, and how ours stand to them
"""

from __future__ import annotations

EXPERIMENTS = {
    "fig4": "Reading back, by context length",
    "fig5": "Reading back, by compression ratio",
    "table1": "Perplexity of what follows: from text, from slots, from nothing",
    "table2": "One text and what was read back",
    "table3": "Normal, patterned and random text",
    "table4": "Answers from slots against answers from the full text",
    "table5": "Ratios, ways of pretraining, and a summary of the same length",
    "table6": "Several bases",
    "table7": "Latency and memory",
    "fig6": "Several segments: perplexity against tokens read",
    "qa": "Questions on paragraphs, with the same budget of tokens",
    "memory": "Which tokens are lost: error against surprise",
}
"""Every experiment's name and title, in the order in which they run."""
