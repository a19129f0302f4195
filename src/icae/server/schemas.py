"""Requests and replies, as pydantic models; the OpenAPI description is made from them.

Unknown fields are ignored, as clients of OpenAI's interface expect; those of `/v1/contexts`, which is ours, are refused. What
OpenAI's interface has and this server cannot do (several choices, tools, log-probabilities, penalties, response formats) is refused where
a request asks for it, instead of being passed over in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from icae.config import MOST_BEGINNINGS

Text = Annotated[str, Field(max_length=4 << 20)]
ContextId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="As `POST /v1/contexts` returned it.")]
_UNSUPPORTED: dict[str, Any] = {
    "tools": None,
    "functions": None,
    "logprobs": None,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "logit_bias": None,
    "audio": None,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "best_of": 1,
    "n": 1,
    "echo": False,
    "suffix": None,
}


class TextPart(BaseModel):
    """Plain text."""

    type: Literal["text"]
    text: Text


class ContextPart(BaseModel):
    """A context that is read as memory slots: one that is stored, or a text that is compressed (and stored) on the way."""

    type: Literal["context"]
    context_id: ContextId | None = None
    text: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> ContextPart:
        if (self.context_id is None) == (self.text is None):
            raise ValueError("a context part has either context_id or text")
        return self


class EmbedsPart(BaseModel):
    """Input embeddings in the place of text (vLLM's part, but in safetensors: pickled tensors are refused)."""

    type: Literal["prompt_embeds"]
    data: str = Field(description="Base64 of a safetensors file with one tensor (tokens, hidden size).")


Part = Annotated[TextPart | ContextPart | EmbedsPart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=256)]


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    include_usage: bool = False


class Generation(BaseModel):
    """What chats and completions share."""

    model: str | None = Field(None, description="The served model's id; may be left away.")
    max_tokens: int | None = Field(None, ge=1, le=1 << 20)
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, takes the likeliest token each time.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 62), le=1 << 62)
    stop: Annotated[str, Field(max_length=1000)] | Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=4)] | None = (
        None
    )
    stream: bool | None = False
    beginnings: int | None = Field(
        None,
        ge=0,
        le=MOST_BEGINNINGS,
        description="Likeliest first tokens that a chat's answer about contexts is begun with, to go on from the likeliest beginning; "
        "0: the server's own number. Where not given: 0, but 1 for a stream, whose first words would come later.",
    )
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, neutral in _UNSUPPORTED.items():
                value = values.get(name)
                if value is not None and value is not False and value not in (neutral, [], {}):  # 0 would equal False
                    raise ValueError(f"{name} is not supported by this server; leave it away")
        return values


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 20, description="The newer name of max_tokens.")


class CompletionRequest(Generation):
    """`POST /v1/completions`: the text goes on; after a context, as its continuation."""

    prompt: Text | Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]], Field(max_length=1 << 20)] = Field(
        "", description="A text, or token ids; a list of one prompt is that prompt."
    )
    context_id: ContextId | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and any(isinstance(part, (str, list)) for part in prompt):
            if len(prompt) > 1:
                raise ValueError("a request has one prompt; send several one by one")
            return prompt[0]
        return prompt


class ContextRequest(BaseModel):
    """`POST /v1/contexts` as JSON."""

    model_config = ConfigDict(extra="forbid")

    text: Text
    name: str | None = Field(None, min_length=1, max_length=400)
    ratio: int | None = Field(None, ge=1, le=256, description="Context tokens a slot; the checkpoint's own where not given.")


class Saved(BaseModel):
    """What slots stood for."""

    context_tokens: int
    slots: int
    saved_tokens: int = Field(description="Context tokens that the model did not have to read.")
    kv_bytes: int = Field(description="Keys and values of the prompt, in bytes.")


class Usage(BaseModel):
    """Tokens that the model really handled: slots count as prompt tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    icae: Saved = Saved(context_tokens=0, slots=0, saved_tokens=0, kv_bytes=0)


class Context(BaseModel):
    """A stored context."""

    id: str
    object: Literal["context"] = "context"
    name: str
    tokens: int
    slots: int
    segments: int
    bytes: int
    created: int
    kind: str
    ratio: int
    cached: bool | None = Field(None, description="When made: this key had the same content before.")


class ContextList(BaseModel):
    """All contexts of a key."""

    object: Literal["list"] = "list"
    data: list[Context]


class ReadToken(BaseModel):
    """One token of a context, and how well its slots hold it."""

    text: str
    slot: int = Field(description="The slot that stands for it, counted over the whole context.")
    hit: bool = Field(description="Read back from the slots, given the true tokens before it, it is the likeliest.")
    nll: float = Field(description="Its negative log-likelihood then, in nats.")
    surprise: float = Field(description="Its negative log-likelihood in nats for the base, which reads the segment as plain text.")


class Reading(BaseModel):
    """A context read back, token by token."""

    id: str
    tokens: list[ReadToken]
    slots: int = Field(description="Slots that these tokens take.")
    complete: bool = Field(description="Whether this is the whole context.")


class Deleted(BaseModel):
    """A context that is gone."""

    id: str
    object: Literal["context"] = "context"
    deleted: bool = True


class Problem(BaseModel):
    """What is wrong, and how to mend it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """Every error, in OpenAI's form."""

    error: Problem
