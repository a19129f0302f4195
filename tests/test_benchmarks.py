"""The serving benchmark's own parts on a tiny base: they run, and they find out what they are there to find out."""

import json
import multiprocessing
import sys
from pathlib import Path

import pytest
from test_server import MODEL, TEXT, Live
from tiny import LINES, load_script, make_icae

from icae.server.app import create_app
from icae.store import SlotStore

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
httpx = pytest.importorskip("httpx")
serving = pytest.importorskip("serving")
soak = pytest.importorskip("soak")


class Here(Live):
    """A server in this process, with what a soak asks of it."""

    def connect(self):
        return httpx.Client(base_url=self.url, timeout=60)

    def memory(self):
        return 1000

    def metric(self, name):
        return soak.Served.metric(self, name)


@pytest.fixture(scope="module")
def model(base):
    return make_icae(base, stirred=0.05, beginnings=3)


@pytest.fixture
def live(model, tmp_path):
    store = SlotStore(tmp_path / "store")
    for i in range(3):
        store.add(model, " ".join(LINES[i:]), f"t{i}")
    with Here(create_app(model, store, name=MODEL)) as made, made.connect() as made.client:
        made.store, made.texts = store, {store.entry(f"t{i}").id: " ".join(LINES[i:]) for i in range(3)}
        yield made


def test_a_soak_loses_nothing_and_mixes_nothing_up(live):
    found = soak.soak(live, live.texts, ["Who rings?", "Who painted?"], requests=120, clients=8, limit=4)
    assert found["outcomes"]["wrong"] == found["outcomes"]["lost"] == found["left_over"] == 0
    assert sum(found["outcomes"].values()) == sum(found["kinds"].values()) == 120
    assert set(found["kinds"]) >= {"chat", "stream", "completion", "context", "list", "malformed", "cancelled", "text on the way"}
    assert {e.name for e in live.store.entries() if not e.name.startswith("text-")} == {"t0", "t1", "t2"}


def test_a_soak_finds_answers_that_are_another_s(live, monkeypatch):
    prefixes = live.server.config.app.state.server.service.prefixes
    real, count = prefixes.get, iter(range(10_000))
    monkeypatch.setattr(prefixes, "get", lambda key: real(key if next(count) < 60 else next(iter(prefixes.kept))))
    found = soak.soak(live, live.texts, ["Who rings?"], requests=80, clients=4, limit=4)
    assert found["outcomes"]["wrong"] > 0


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_parts_that_need_no_server_run_and_keep_what_others_found(checkpoint, base_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "serving.json"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT * 5)
    given = ["--quick", "--model", checkpoint, "--base", base_folder, "--text", tmp_path / "text", "--out", out]
    for parts in (["memory", "load"], ["int8"]):
        if out.exists():
            report = json.loads(out.read_text()) | {"machine": "another"}  # before parts told theirs
            del report["results"]["load"]["machine"]
            out.write_text(json.dumps(report))
        monkeypatch.setattr(sys, "argv", ["serving.py", *parts, *map(str, given)])
        serving.main()
    report = json.loads(out.read_text())
    assert set(report["results"]) == {"memory", "load", "int8"} and report["base_fingerprint"]
    assert {name: part["machine"] for name, part in report["results"].items()} == {
        "memory": report["machine"],
        "load": "another",
        "int8": report["machine"],
    }
    assert all(part["checkpoint"] == "checkpoint" for part in report["results"].values())
    context = report["results"]["memory"]["measures"][0]
    assert context["value"] == pytest.approx(4) and context["enough"]
    assert report["results"]["int8"]["bytes"]["int8"] < report["results"]["int8"]["bytes"]["float16"]
    assert "checksums included" in capsys.readouterr().out


def test_a_training_process_that_fails_ends_the_run(monkeypatch):
    training = load_script("benchmarks/training.py")
    begun = []

    class Context:
        Pipe = staticmethod(multiprocessing.Pipe)

        class Process:
            def __init__(self, args, **_):
                begun.append(args[-1].fileno())  # and it ends at once

            def start(self):
                pass

    monkeypatch.setattr(training.multiprocessing, "get_context", lambda _: Context)
    monkeypatch.setattr(sys, "argv", ["training.py", "--processes", "2"])
    with pytest.raises(SystemExit, match="stands above"):
        training.main()
    assert begun
    monkeypatch.setattr(sys, "argv", ["training.py", "--length", "256"])
    with pytest.raises(SystemExit) as refused:
        training.main()
    assert refused.value.code == 2


def test_answers_are_heard_in_the_processes_order(monkeypatch):
    training = load_script("benchmarks/training.py")
    (one, its_end), (other, others_end) = multiprocessing.Pipe(), multiprocessing.Pipe()
    others_end.send(2)
    its_end.send(1)
    assert training.hear([one, other]) == [1, 2]
    others_end.close()  # the first may wait for it
    with pytest.raises(SystemExit, match="stands above"):
        training.hear([one, other])
