# Questions for `icae finetune configs/kv-4x-encyclopedia.yaml`, about paragraphs of Wikipedia that no adapter has read and about those of QED
# train: an hour and a half of one core that has units for bfloat16 (AMX). Before it: `python configs/technical.py runs/technical`.
set -e
data=../shared/data/qa
pip install -q mwparserfromhell
pip download -q --no-deps --dest runs/gensim gensim
python configs/encyclopedia.py runs/encyclopedia.jsonl $data/qed-dev.jsonl
python configs/studied.py turn $data/qed-train.jsonl runs/studying.jsonl
python benchmarks/full_text_qa.py train configs/kv-4x.yaml output=runs/study 'train={runs/studying.jsonl: 1}' pretrain_share=0 replay=null \
  distractors=0 ratios=null context_length=230 batch_size=16 learning_rate=0.0012 warmup_steps=10 steps=195 minutes=null save_steps=100 \
  workers=0 device=cpu bf16=false
python configs/studied.py ask runs/asked-encyclopedia.jsonl --asker runs/study runs/encyclopedia.jsonl $data/qed-train.jsonl
icae data build runs/encyclopedia.jsonl runs/general-encyclopedia.jsonl --texts 100 --kinds \
  rephrase,summary,title,keywords,continue,topic,events,detail,tone --prompts 3 --least 150 --most 1200 --answer-tokens 72 --test-share 0
