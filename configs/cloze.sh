# The questions that the shipped adapters learned beside those that somebody asked: runs/cloze.jsonl.
technical=runs/technical/train
python configs/cloze.py runs/cloze.jsonl 20000 ../shared/data/qa/qed-train.jsonl 0.45 ../shared/data/books/train 0.35 \
  $technical/reference 0.04 $technical/docstrings 0.08 $technical/readmes 0.04 $technical/licences 0.04
# Several about each paragraph that people asked about: for `prompts`, in a run that was given up (docs/log.md).
python configs/cloze.py runs/cloze-qed.jsonl 28000 ../shared/data/qa/qed-train.jsonl 1
