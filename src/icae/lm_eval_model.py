"""lm-evaluation-harness reads through slots: the model class `icae`.

    python -m icae.lm_eval_model --model icae --model_args adapter=FOLDER,ratio=4 --tasks lambada_openai

is the harness's own command line (`pip install 'icae[lm-eval]'`), with this class registered. Each request's context is compressed, and the
base reads slots in its place; the last `tail` tokens of the context may stay text, which the continuation then follows. A context too short
to be compressed (fewer than two tokens) is read as text. There is no compression in what a task calls its continuation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from icae.chat import tokenize
from icae.errors import ICAEError
from icae.model import ICAE
from icae.objectives import Example, Marker
from icae.reader import Score


@register_model("icae")
class IcaeLM(TemplateLM):
    """An adapter and its base, as the harness sees a language model.

    Parameters
    ----------
    adapter : str, optional
        Checkpoint; none: the one that ships.
    base : str, optional
        Its base; none: the one that the checkpoint names.
    ratio : int, optional
        Context tokens a slot; none: the checkpoint's own.
    tail : int
        Last tokens of a context that stay text.
    max_gen_toks : int
        Tokens generated where a task sets no limit.
    dtype : str
        What the base is kept in, as for `load_base`.
    batch_size, device, max_batch_size
        As the harness's command line gives them.

    Raises
    ------
    ICAEError
        If a number is below its least, or the checkpoint cannot be loaded.
    """

    def __init__(
        self,
        adapter: str | None = None,
        base: str | None = None,
        ratio: int | None = None,
        tail: int = 0,
        max_gen_toks: int = 128,
        batch_size: int | str = 4,
        device: str | None = None,
        dtype: str = "float32",
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if tail < 0 or (ratio is not None and ratio < 1):
            raise ICAEError(f"tail must be at least 0 and ratio at least 1, got {tail} and {ratio}")
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cpu"  # the harness asks for cuda:0 where nobody said otherwise
        self.model = ICAE.from_pretrained(adapter, base=base, device=device, dtype=dtype)
        self.tokenizer = self.model.base.tokenizer
        self.ratio, self.tail, self.max_gen_toks = ratio, tail, max_gen_toks
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 4

    # ---- what the harness asks for ----

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.model.base.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The id that stands for an empty context: the last of what the tokenizer puts before a text, else the one that ends a text."""
        return (self.model.base.lead or [self.eot_token_id])[-1]

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, which tells caches apart."""
        return str(self.model.base.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise with the special tokens that a chat template wrote, and none put around them: slots stand where a BOS would."""
        return tokenize(self.tokenizer, string, special=True)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat in the tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations after their contexts: (log-likelihood in nats, whether greedy decoding gives it)."""
        found: list[tuple[float, bool]] = []
        for at in range(0, len(requests), self.batch_size):
            part = requests[at : at + self.batch_size]
            for (strings, _, _), score in zip(part, self._scores([(c, t) for _, c, t in part]), strict=True):
                found.append((-float(score.nll.sum()), bool(score.hits.all())))
                self.cache_hook.add_partial("loglikelihood", strings, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in pieces as long as a segment, each after the slots of all before it; the first piece after nothing."""
        found = []
        for request in requests:
            (text,) = request.args
            ids, step = self.tok_encode(text), self.model.config.segment_length
            pairs = [(ids[max(0, at - self._room(step)) : at], ids[at : at + step]) for at in range(0, len(ids), step)]
            total = 0.0
            for at in range(0, len(pairs), self.batch_size):
                total -= sum(float(s.nll.sum()) for s in self._scores(pairs[at : at + self.batch_size]))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts greedily until a stop string, the base's EOS, or the limit."""
        found = []
        for request in requests:
            context, settings = request.args
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            if settings.get("do_sample") or settings.get("temperature"):
                raise ICAEError("the icae model of lm-evaluation-harness generates greedily; take do_sample and temperature off the task")
            text = self._generate(self.tok_encode(context), int(settings.get("max_gen_toks", self.max_gen_toks)), stops)
            found.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    # ---- through the slots ----

    def _split(self, context: list[int]) -> tuple[list[int], list[int]]:
        """Return what is compressed of a context, and what stays text."""
        head = len(context) - self.tail
        return ([], context) if head < 2 else (context[:head], context[head:])

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Score (context, continuation) pairs; those with slots and those without go in batches of their own."""
        scores: dict[int, Score] = {}
        split = [self._split(context[-self._room(len(target)) :]) for context, target in pairs]
        for compressed in (True, False):
            rows = [i for i, (head, _) in enumerate(split) if bool(head) == compressed]
            if not rows:
                continue
            if compressed:
                slots = self.model.compress_ids([split[i][0] for i in rows], ratio=self.ratio)
                made = self.model.score(slots, [Example([], Marker.LM, split[i][1], pairs[i][1]) for i in rows])
            else:
                made = self.model.score(None, [Example([], Marker.LM, self._led(split[i][1]), pairs[i][1]) for i in rows], marked=False)
            scores.update(zip(rows, made, strict=True))
        return [scores[i] for i in range(len(pairs))]

    def _generate(self, context: list[int], limit: int, stops: list[str]) -> str:
        head, tail = self._split(context[-self._room(limit) :])
        slots = self.model.compress_ids([head], ratio=self.ratio)[0] if head else None
        text = ""
        begun = tail if head else self._led(tail)
        for piece in self.model.stream_continuation(slots, begun=begun, max_new_tokens=limit, may_end=True):
            text += piece
            for stop in stops:
                if stop and stop in text:
                    return text[: text.index(stop)]
        return text

    def _led(self, ids: list[int]) -> list[int]:
        """Return ids after what the tokenizer puts before a text (an EOS where that is nothing), of which they may hold the last."""
        lead = self.model.base.lead or [self.eot_token_id]
        return ids if ids[: len(lead)] == lead else lead + (ids if ids != [self.prefix_token_id] else [])

    def _room(self, behind: int) -> int:
        """Return the longest context that leaves the base positions for `behind` tokens, the marker and a lead."""
        return self.model.base.max_positions - behind - self.model.config.marker_length - 1


def main() -> None:
    """Run the harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ICAEError as error:
        print(f"icae: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
