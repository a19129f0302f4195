"""Chat templates of four families, on the tests' tokenizer with each family's own special tokens."""

import dataclasses
import threading

import pytest
from tiny import TEMPLATE, make_tokenizer, one_line
from tokenizers import AddedToken

from icae import chat
from icae.chat import CUT, chat_prompt, chat_response, encode, end_of_turn, render, tokenize
from icae.errors import ICAEError

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# template, special tokens, what opens a first user's turn and what closes the last one, the end of an answer; strings are plain text
FAMILIES = {
    "llama": (
        LLAMA,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        ["<s>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"],
        ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"],
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"], ["<s>", "[INST]", " "], [" ", "[/INST]"], "</s>"),
    "qwen": (
        QWEN,
        ["<|im_start|>", "<|im_end|>"],
        ["<|im_start|>", "system\nYou help.", "<|im_end|>", "\n", "<|im_start|>", "user\n"],
        ["<|im_end|>", "\n", "<|im_start|>", "assistant\n"],
        "<|im_end|>",
    ),
    "gemma": (
        GEMMA,
        ["<start_of_turn>", "<end_of_turn>"],
        ["<s>", "<start_of_turn>", "user\n"],
        ["<end_of_turn>", "\n", "<start_of_turn>", "model\n"],
        "<end_of_turn>",
    ),
}


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """(tokenizer, special tokens, opening, closing, end of an answer)."""
    template, special, *rest = FAMILIES[request.param]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return tokenizer, special, *rest


def ids_of(tokenizer, pieces):
    """Ids of pieces: a special token each its one id, everything between them read together as plain text."""
    special, ids, plain = set(tokenizer.all_special_tokens) | {t.content for t in tokenizer.added_tokens_decoder.values()}, [], ""
    for piece in [*pieces, None]:
        if piece is not None and piece not in special:
            plain += piece
            continue
        ids += tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        plain = ""
        if piece is not None:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
    return ids


def test_a_prompt_has_exactly_the_familys_ids(family):
    tokenizer, _, opening, closing, _ = family
    assert chat_prompt(tokenizer, "Who painted the door?") == ids_of(tokenizer, [*opening, "Who painted the door?", *closing])


def test_without_special_text_the_ids_are_those_of_the_familys_own_template(family):
    tokenizer = family[0]
    turns = [{"role": "user", "content": "Hi\nthere "}, {"role": "assistant", "content": "Hello."}]
    own = tokenizer.apply_chat_template([*turns, {"role": "user", "content": "Who?"}], add_generation_prompt=True, return_dict=False)
    assert chat_prompt(tokenizer, "Who?", turns) == own


def test_a_response_ends_as_the_familys_turns_end(family):
    tokenizer, _, _, _, end = family
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    assert chat_response(tokenizer, "Nine letters.") == ids_of(tokenizer, ["Nine letters.", end])


def test_what_users_write_never_becomes_a_special_token(family):
    tokenizer, special, opening, closing, end = family
    words = [*special, "<s>", "</s>"]
    wicked = [f"A {word} B" for word in words]
    wicked += ["".join(words), words[0][:3] + words[0] + words[0][3:], f"{end}{end}", f"x{CUT}{end[:2]}{CUT}{end[2:]}"]
    known = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    plain = [i for i in chat_prompt(tokenizer, "x") if i in known]
    for text in wicked:
        ids = chat_prompt(tokenizer, text)
        assert [i for i in ids if i in known] == plain, text
        content = ids_of(tokenizer, [text.replace(CUT, "") + "!"])[:-1]
        assert tokenizer.decode(ids) == tokenizer.decode([*ids_of(tokenizer, opening), *content, *ids_of(tokenizer, closing)])
        assert not known & set(chat_response(tokenizer, text)[:-1])


def test_special_text_in_a_chat_that_is_split_elsewhere_stays_plain(family):
    tokenizer, special, *_ = family
    text = render(tokenizer, [{"role": "user", "content": f"left MARK {special[-1]} right"}])
    left, right = text.split("MARK")
    known = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert sum(i in known for i in encode(tokenizer, left) + encode(tokenizer, right)) == sum(
        i in known for i in chat_prompt(tokenizer, "x")
    )


def test_an_added_token_that_frames_the_turns_counts_as_special_whatever_its_mark():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<turn>", special=False, normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert chat_prompt(tokenizer, "a <turn> b").count(turn) == 1


def test_messages_that_the_template_refuses_are_an_error_in_one_line(family):
    tokenizer = family[0]
    if "raise_exception" not in tokenizer.chat_template:
        assert chat_prompt(tokenizer, "x", [{"role": "system", "content": "Be brief."}])
        return
    with pytest.raises(ICAEError) as error:
        chat_prompt(tokenizer, "x", [{"role": "system", "content": "Be brief."}])
    one_line(error.value, "System role not supported")


def test_of_several_templates_the_default_one_counts():
    tokenizer, plain = make_tokenizer(), make_tokenizer()
    plain.chat_template = TEMPLATE
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ 'tools' }}"}
    assert chat_prompt(tokenizer, "What?") == chat_prompt(plain, "What?") and end_of_turn(tokenizer) == end_of_turn(plain)
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}"}
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_bases_that_may_think_aloud_answer_at_once():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% if enable_thinking is defined and enable_thinking is false %}no thoughts{% endif %}"
    assert tokenizer.decode(chat_prompt(tokenizer, "What?")).endswith("no thoughts")


def test_without_a_template_an_answer_ends_with_eos():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_generation_stops_where_the_template_ends_a_turn(base):
    from icae.base import Base

    tokenizer = make_tokenizer()
    assert set(Base(base.model, tokenizer, "t", "f").eos_ids) >= {tokenizer.eos_token_id}
    word = "lamp"
    tokenizer.add_tokens([AddedToken(word, special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}lamp{% endfor %}"
    assert tokenizer.convert_tokens_to_ids(word) in Base(base.model, tokenizer, "t", "f").eos_ids


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_chat_prompt_is_the_template_up_to_where_the_response_begins(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    expected = "<|user|>Hi</s><|assistant|>Hello</s><|user|>Who?</s><|assistant|>" if template else "Hi\nHello\nWho?\n"
    assert tokenizer.decode(chat_prompt(tokenizer, "Who?", turns)) == expected
    assert tokenizer.decode(chat_prompt(tokenizer, "Who?")) == ("<|user|>Who?</s><|assistant|>" if template else "Who?\n")


def test_a_response_ends_with_the_tokenizers_eos():
    tokenizer = make_tokenizer()
    ids = chat_response(tokenizer, "Nine letters.")
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == "Nine letters."


def test_what_leads_a_text_is_asked_in_turns_and_once(base, monkeypatch):
    held, real = [], type(base.tokenizer).__call__
    monkeypatch.setattr(type(base.tokenizer), "__call__", lambda *a, **kw: (held.append(chat._turns.locked()), real(*a, **kw))[1])
    fresh = dataclasses.replace(base)
    assert fresh.lead == fresh.lead == [base.tokenizer.bos_token_id]
    assert held == [True, True]


def test_threads_do_not_disturb_one_another_s_special_tokens():
    tokenizer = make_tokenizer()
    due, wrong, over = tokenize(tokenizer, "a</s>b", special=True), [], threading.Event()
    assert 1 in due and 1 not in tokenize(tokenizer, "a</s>b", special=False)

    def disturb():
        while not over.is_set():
            tokenize(tokenizer, "a</s>b", special=False)

    others = [threading.Thread(target=disturb) for _ in range(3)]
    for other in others:
        other.start()
    for _ in range(2000):
        wrong += [ids for ids in [tokenize(tokenizer, "a</s>b", special=True)] if ids != due]
    over.set()
    for other in others:
        other.join()
    assert not wrong
