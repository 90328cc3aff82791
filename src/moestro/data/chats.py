"""Read chats from the common data set formats as messages with a role and a content."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from moestro.errors import Misuse
from moestro.gate.loading import one_misuse
from moestro.gate.patience import within

Message: TypeAlias = Mapping[str, Any]
"""Input of a chat template: `role`, `content`, and any other fields of the row, such as `tool_calls`."""

CHAT_COLUMNS = (("messages",), ("conversations",), ("conversation",), ("prompt", "completion"))
"""Columns that hold a chat, in the order of preference."""

LARGEST_GROWTH, LONGEST_FRAME = 64, 2**20
"""A chat template may multiply a chat's characters and then add others: the words around it, such as a system prompt.
"""

PATIENCE = 10.0
"""Seconds that a chat template may take for one chat."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}
_PAIR = {"prompt": "user", "completion": "assistant"}


def chat_columns(names: Collection[str]) -> tuple[str, ...] | None:
    """Return the columns among `names` that hold a chat; None if there are none."""
    return next((columns for columns in CHAT_COLUMNS if set(columns).issubset(names)), None)


def messages_of(columns: Sequence[str], values: Sequence[object]) -> tuple[Message, ...] | None:
    """Return the messages in a row's `values`; None if they hold no chat.

    Messages have the keys `role` and `content`, or `from` and `value` (ShareGPT, LLaVA). The columns `prompt` and
    `completion` hold lists of messages, or one text of the user and one of the assistant.
    """
    paired = tuple(columns) == ("prompt", "completion")
    messages: list[Message] = []
    for column, value in zip(columns, values, strict=True):
        if isinstance(value, list) and all(map(_is_message, value)):
            messages += map(_message, value)
        elif paired and isinstance(value, str):
            messages.append({"role": _PAIR[column], "content": value})
        else:
            return None
    return tuple(messages)


def plain(messages: Sequence[Message]) -> str:
    """Return a chat as text for tokenizers without a chat template: `role: content`, a blank line between messages."""
    return "\n\n".join(f"{message['role']}: {_words(message)}" for message in messages)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], source: str) -> str:
    """Return a chat in the tokenizer's chat template.

    Raises:
        Misuse: the template refuses the chat (some do if roles do not alternate), takes longer than 10 s, or makes it
            longer by more than 64 times and a Mi of characters; `source` names the row.
    """
    problem = f"{source} must be rendered by the chat template within {PATIENCE:g} s"
    with one_misuse(f"{source} must fit the tokenizer's chat template"), within(PATIENCE, problem):
        text = cast(str, tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
    most = LARGEST_GROWTH * len(plain(messages)) + LONGEST_FRAME
    if len(text) > most:
        raise Misuse(f"{source} must have at most {most:,} characters in the chat template, got {len(text):,}")
    return text


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and (
        (isinstance(value.get("role"), str) and {"content", "tool_calls"} & set(value) != set())
        or (isinstance(value.get("from"), str) and isinstance(value.get("value"), str))
    )


def _message(value: dict[str, Any]) -> Message:
    if "role" in value:
        kept = {name: content for name, content in value.items() if content is not None}
        return kept | {"content": _text_of(value.get("content"))}
    role = value["from"].lower()
    return {"role": _ROLES.get(role, role), "content": value["value"]}


def _text_of(content: object) -> str:
    """Return the text of a message; if it has parts (text and images), its text parts joined by line ends."""
    if isinstance(content, list):
        return "\n".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content if isinstance(content, str) else "" if content is None else json.dumps(content)


def _words(message: Message) -> str:
    calls = message.get("tool_calls")
    return "\n".join(part for part in (message["content"], json.dumps(calls) if calls else "") if part)
