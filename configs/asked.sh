# What `icae finetune configs/kv-4x-answers.yaml` learns from, and the adapter that it begins with: the shipped one (its first stage,
# configs/kv-4x.yaml), taught by people's questions while more are made. Before it: `python configs/technical.py runs/technical`,
# `sh configs/cloze.sh`, `sh configs/general.sh`, and the base tuned with the full text:
# `python benchmarks/full_text_qa.py train configs/kv-4x.yaml output=runs/full-text`. On an accelerator, `DEVICE=cuda sh configs/asked.sh`.
set -e
device=${DEVICE:-cpu}
technical=runs/technical/train
python configs/asked.py turn ../shared/data/qa/qed-train.jsonl runs/asking.jsonl
python benchmarks/full_text_qa.py train configs/kv-4x.yaml output=runs/asker 'train={runs/asking.jsonl: 1}' \
  pretrain_share=0 replay=null distractors=0 ratios=null learning_rate=0.0015 steps=200 minutes=1 save_steps=9999 device=$device
ask() { python configs/asked.py ask "$@" --asker runs/asker --answerer runs/full-text --device $device --together ${TOGETHER:-16}; }
ask runs/asked-qed.jsonl ../shared/data/qa/qed-train.jsonl 0
ask runs/asked-texts.jsonl ../shared/data/books/train 3000 $technical/docstrings 500 $technical/readmes 300 $technical/reference 300 \
  $technical/licences 200
icae finetune configs/kv-4x-answers.yaml init=smollm2-135m-kv-4x output=runs/kv-4x-begun minutes=2 batch_size=96 prompts=1 \
  schedule=constant_with_warmup save_steps=9999 device=$device \
  'train={../shared/data/qa/qed-train.jsonl: 0.6, runs/cloze.jsonl: 0.25, runs/general-qed.jsonl: 0.1, runs/general-books.jsonl: 0.05}'
