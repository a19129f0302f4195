import pytest
from test_cli import TEXT, checkpoint, icae, slots, text  # noqa: F401 - fixtures
from tiny import make_icae

from icae.chat import chat_prompt
from icae.chat_cli import fitting
from icae.model import ICAE
from icae.slots import MemorySlots
from icae.store import SlotStore


@pytest.fixture
def model(checkpoint):  # noqa: F811
    return ICAE.from_pretrained(checkpoint)


def test_turns_are_kept_and_answers_are_those_of_the_library(icae, checkpoint, slots, model):  # noqa: F811
    made, history = MemorySlots.load(slots), []
    for prompt in ("Who?", "And then?"):
        answer = "".join(model.stream_answer(made, prompt, history=history, max_new_tokens=5))
        history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.strip()}]
    asked = ("chat", slots, "--max-tokens", 5, "--model", checkpoint)
    code, out, err = icae(*asked, stdin=b"Who?\n\n  \nAnd then?\n/quit\nNever?\n")
    assert code == 0 and "slots" in err
    first, second = (turn["content"] for turn in history[1::2])
    assert " ".join(out.split()) == " ".join(f"{first} {second}".split())
    alone = icae(*asked, stdin=b"Who?\n/forget\nAnd then?")[1]
    assert alone.split() == (first + " " + model.answer(made, "And then?", max_new_tokens=5)).split()


def test_a_text_file_is_compressed_first(icae, checkpoint, text, slots):  # noqa: F811
    asked = ("--max-tokens", 4, "--model", checkpoint)
    full = icae("compress", text, "-o", "full.safetensors", "--full", "--model", checkpoint)
    assert full[0] == 0
    assert icae("chat", text, *asked, stdin=b"Who?\n")[1] == icae("chat", "full.safetensors", *asked, stdin=b"Who?\n")[1]


def test_a_stored_context_is_found_by_its_name(icae, checkpoint, text, slots):  # noqa: F811
    asked = ("--max-tokens", 4, "--model", checkpoint)
    assert icae("store", "add", text, "--name", "paper", "--store", "kept", "--model", checkpoint)[0] == 0
    SlotStore("kept").load("paper").save("paper.safetensors")
    assert (
        icae("chat", "--stored", "paper", "--store", "kept", *asked, stdin=b"Who?\n")[1]
        == icae("chat", "paper.safetensors", *asked, stdin=b"Who?\n")[1]
    )


def test_a_turn_that_does_not_fit_ends_itself_alone(icae, checkpoint, slots):  # noqa: F811
    fits = icae("chat", slots, "--model", checkpoint, "--max-tokens", 4, stdin=b"Who?\n")
    code, out, err = icae("chat", slots, "--model", checkpoint, "--max-tokens", 4, stdin=b"word " * 2000 + b"\nWho?\n")
    assert code == 0 and out == fits[1] and "shorten" in err


def test_a_turn_that_does_not_fit_takes_nothing_of_the_conversation_along(icae, checkpoint, slots):  # noqa: F811
    asked = ("chat", slots, "--max-tokens", 5, "--model", checkpoint)
    plain = icae(*asked, stdin=b"Who?\nAnd then?\n")[1]
    code, out, err = icae(*asked, stdin=b"Who?\n" + b"word " * 5000 + b"\nAnd then?\n")
    assert code == 0 and out == plain and "shorten" in err


def test_bytes_that_are_no_utf_8_end_their_turn_alone(icae, checkpoint, slots):  # noqa: F811
    asked = ("chat", slots, "--max-tokens", 5, "--model", checkpoint)
    code, out, err = icae(*asked, stdin=b"caf\xe9?\nWho?\n")
    assert code == 0 and "UTF-8" in err and out == icae(*asked, stdin=b"Who?\n")[1]


def test_old_turns_leave_when_the_positions_run_out(base):
    model = make_icae(base)
    made = model.compress(TEXT)
    history = [{"role": role, "content": f"{i} " + "word " * 20} for i in range(12) for role in ("user", "assistant")]
    left = fitting(model, made, history, "Who?", 50)
    assert 0 < len(left) < 24 and left == history[-len(left) :] and len(left) % 2 == 0
    used = [made.span + 2 + len(chat_prompt(base.tokenizer, "Who?", turns)) + 50 for turns in (left, history[-len(left) - 2 :])]
    assert used[0] <= base.max_positions < used[1]


def test_mistakes_are_one_line(icae, checkpoint, tmp_path):  # noqa: F811
    for arguments, words in (
        (("chat", "none.safetensors"), "no slot file"),
        (("chat", "none.txt"), "none.txt"),
        (("chat",), "--stored"),
        (("chat", "none.txt", "--stored", "a"), "not both"),
        (("chat", "none.safetensors", "--ratio", 4), "made already"),
    ):
        code, out, err = icae(*arguments, "--model", checkpoint, stdin=b"Who?\n")
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1
