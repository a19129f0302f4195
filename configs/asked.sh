# Questions for `icae finetune configs/kv-4x-answers.yaml`. Before it: `python configs/technical.py runs/technical`, `sh configs/cloze.sh`, and
# the base tuned with the full text, `python benchmarks/full_text_qa.py train configs/kv-4x.yaml output=runs/full-text`; beside it `sh configs/general.sh`.
# On an accelerator, `DEVICE=cuda TOGETHER=512 sh configs/asked.sh` (docs/log.md tells how long that took).
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
