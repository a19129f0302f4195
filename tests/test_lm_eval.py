"""The harness's model class on a tiny base, and a task of the tests' own through the harness itself."""

import json

import pytest
import tiny

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from icae.errors import ICAEError
from icae.lm_eval_model import IcaeLM, main
from icae.objectives import Example, Marker

TASK = """task: bells
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["noon", "fog"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def task(folder):
    """Write a task of the tests' own."""
    (folder / "bells.jsonl").write_text("".join(json.dumps({"text": line, "label": i % 2}) + "\n" for i, line in enumerate(tiny.LINES)))
    (folder / "bells.yaml").write_text(TASK.format(data=folder / "bells.jsonl"))


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness") / "adapter"
    tiny.make_icae(base, stirred=0.05).save_pretrained(folder)
    return folder


def requests(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def test_a_context_goes_through_the_slots(checkpoint):
    lm = IcaeLM(str(checkpoint))
    (likelihood, greedy), (other, _) = lm.loglikelihood(
        requests("loglikelihood", (tiny.LINES[0], " The bell"), (tiny.LINES[1], " The bell")), disable_tqdm=True
    )
    context, whole = lm.tok_encode(tiny.LINES[0]), lm.tok_encode(tiny.LINES[0] + " The bell")
    slots = lm.model.compress_ids([context])
    (score,) = lm.model.score(slots, [Example([], Marker.LM, [], whole[len(context) :])])
    assert likelihood == pytest.approx(-float(score.nll.sum()), abs=1e-3)
    assert greedy == bool(score.hits.all()) and other != likelihood


def test_the_tail_stays_text_and_what_is_too_short_too(checkpoint, base):
    lm = IcaeLM(str(checkpoint), tail=3)
    ids = lm.tok_encode(tiny.LINES[0])
    assert lm._split(ids) == (ids[:-3], ids[-3:]) and lm._split(ids[:4]) == ([], ids[:4])
    (found,) = lm._scores([(ids[:4], ids[4:7])])
    likely = tiny.base_logits(base, base.lead + ids).log_softmax(-1)
    expected = [-float(likely[len(base.lead) + i - 1, ids[i]]) for i in (4, 5, 6)]
    assert found.nll.tolist() == pytest.approx(expected, abs=1e-4)


def test_an_empty_context_is_what_the_tokenizer_puts_before_a_text(checkpoint, base):
    lm = IcaeLM(str(checkpoint))
    ids = lm.tok_encode(tiny.LINES[0][:12])
    ((likelihood, _),) = lm.loglikelihood(requests("loglikelihood", ("", tiny.LINES[0][:12])), disable_tqdm=True)
    likely = tiny.base_logits(base, base.lead + ids).log_softmax(-1)
    assert likelihood == pytest.approx(sum(float(likely[len(base.lead) + i - 1, ids[i]]) for i in range(len(ids))), abs=1e-3)


def test_a_chat_keeps_its_template_s_special_tokens(checkpoint, base):
    lm = IcaeLM(str(checkpoint))
    asked = lm.apply_chat_template([{"role": "user", "content": "Who rings?"}])
    assert lm.tok_encode(asked) == base.prompted("Who rings?")
    assert base.tokenizer.eos_token_id in lm.tok_encode(asked)


def test_rolling_scores_every_token_once_and_the_first_piece_as_the_base_does(checkpoint, base):
    lm = IcaeLM(str(checkpoint))
    text = tiny.LINES[0]
    ids = lm.tok_encode(text)
    assert len(ids) > 16
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    likely = tiny.base_logits(base, base.lead + ids[:16]).log_softmax(-1)
    first = sum(float(likely[len(base.lead) + i - 1, ids[i]]) for i in range(16))
    rest = [-float(s.nll.sum()) for s in lm._scores([(ids[:at], ids[at : at + 16]) for at in range(16, len(ids), 16)])]
    assert total == pytest.approx(first + sum(rest), rel=1e-4)


def test_generation_goes_through_the_slots_and_stops_where_told(checkpoint):
    lm = IcaeLM(str(checkpoint))
    slots = lm.model.compress(tiny.LINES[2])
    expected = lm.model.continue_text(slots, max_new_tokens=8)
    (made,) = lm.generate_until(requests("generate_until", (tiny.LINES[2], {"until": [], "max_gen_toks": 8})))
    assert made == expected and len(made) > 2
    stop = expected[2:4]
    (cut,) = lm.generate_until(requests("generate_until", (tiny.LINES[2], {"until": [stop], "max_gen_toks": 8})))
    assert cut == expected[: expected.index(stop)]
    with pytest.raises(ICAEError, match="greedily"):
        lm.generate_until(requests("generate_until", (tiny.LINES[2], {"do_sample": True})))


def test_the_harness_own_default_device_falls_back(checkpoint, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert IcaeLM(str(checkpoint), device="cuda:0").model.base.device.type == "cpu"


def test_the_command_line_is_the_harness_own(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task(tmp_path)
    adapter = f"adapter={checkpoint},tail=2"
    arguments = ["--model", "icae", "--model_args", adapter, "--tasks", "bells", "--include_path", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["lm_eval", *arguments])
    main()
    assert "|bells|" in capsys.readouterr().out.replace(" ", "")
    monkeypatch.setattr("sys.argv", ["lm_eval", *(a.replace(adapter, "adapter=/nowhere/at/all") for a in arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "icae: error: no checkpoint" in capsys.readouterr().err


def test_bad_numbers_are_refused_before_anything_is_loaded():
    with pytest.raises(ICAEError) as error:
        IcaeLM("nowhere", tail=-1)
    tiny.one_line(error.value, "tail")


def test_the_harness_runs_a_task_of_ones_own(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(
        model="icae", model_args={"adapter": str(checkpoint)}, tasks=["bells"], task_manager=manager, bootstrap_iters=10, verbosity="ERROR"
    )
    assert found["n-samples"]["bells"]["effective"] == len(tiny.LINES)
    assert found["results"]["bells"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
