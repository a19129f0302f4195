"""Models behind any OpenAI-compatible endpoint: how they are reached, and what their failures are called."""

from __future__ import annotations

import os
from typing import Any

from icae.errors import ICAEError, reason


def connect(url: str | None, *, purpose: str, extra: str, instead: str) -> Any:
    """Return a client of an endpoint.

    Parameters
    ----------
    url : str, optional
        The endpoint; none: `OPENAI_BASE_URL`, else OpenAI's own. The key is `OPENAI_API_KEY`.
    purpose, extra, instead
        For the error messages: what it is needed for, the extra that brings the package, and what to give instead of a key.

    Raises
    ------
    ICAEError
        If the `openai` package or the key is missing.
    """
    try:
        import openai
    except ImportError as error:
        raise ICAEError(f"{purpose} needs the openai package: pip install 'icae[{extra}]'") from error
    try:
        return openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or ("none" if url else None), max_retries=5)
    except openai.OpenAIError as error:
        raise ICAEError(f"no endpoint for {purpose}: set OPENAI_API_KEY, or {instead}") from error


def reply(client: Any, model: str, messages: list[dict[str, str]], **settings: Any) -> tuple[str, Any, Any]:
    """Return what a model says to messages, its first choice, and the usage that the endpoint reports (or none).

    Raises
    ------
    ICAEError
        If the request fails, or what comes back is no reply.
    """
    import openai

    try:
        made = client.chat.completions.create(model=model, messages=messages, **settings)
        choice = made.choices[0]
        return choice.message.content or "", choice, getattr(made, "usage", None)
    except (openai.OpenAIError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise ICAEError(f"the endpoint of {model!r} failed: {reason(error)}") from error
