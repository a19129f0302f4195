# What people ask of any text (summarise, title, keywords, go on, ...), answered by the base with the full text: runs/general-*.jsonl, and of
# held-out text runs/general-dev-*.jsonl. The base answers questions of fact worse than people did; so none of these kinds is among them.
set -e
kinds=rephrase,summary,title,keywords,continue,topic,events,detail,tone
build() { icae data build "$1" "$2" --texts "$3" --kinds $kinds --prompts 6 --least 150 --most 1200 --together 8 --answer-tokens 80 --test-share 0; }
build ../shared/data/qa/qed-train.jsonl runs/general-qed.jsonl 1000
build ../shared/data/books/train runs/general-books.jsonl 500
build ../shared/data/qa/qed-dev.jsonl runs/general-dev-qed.jsonl 40
build ../shared/data/books/dev runs/general-dev-books.jsonl 40
