"""Conversations: their fields, their text by a chat template, and which characters of it are answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from poetx.data.records import Record, shown_fields
from poetx.errors import UserError, nearest, one_line

#: For a tokenizer that has none. Words alone, so that it needs no token of its own but the end of text.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{{ '\\n' }}{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system"}  # ShareGPT's names

#: What a message may say beside its content.
_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

Message = dict[str, Any]
Span = tuple[int, int]


def format_of(record: Record, text_field: str) -> str:
    """What a record is by its fields: ``text``, ``messages``, ``sharegpt``, ``prompt`` or ``alpaca``."""
    if text_field in record:
        return "text"
    for name, fields in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("prompt", {"prompt", "completion"}),
        ("alpaca", {"instruction", "output"}),
    ):
        if fields <= record.keys():
            return name
    return "text"


def conversation(record: Record, kind: str, place: str) -> list[Message]:
    """The messages of a record of a format other than text, each with ``role`` and ``content``.

    Raises:
        UserError: a field that is missing or of another type, with its place.
    """
    if kind in ("messages", "sharegpt"):
        name = "messages" if kind == "messages" else "conversations"
        items = _field(record, name, list, place)
        messages = [_message(item, f"{place}, {name}[{number}]") for number, item in enumerate(items)]
    elif kind == "prompt":
        messages = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            value = _field(record, name, (str, list), place)
            if isinstance(value, str):
                messages.append({"role": role, "content": value})
            else:
                messages += [_message(item, f"{place}, {name}[{number}]") for number, item in enumerate(value)]
    else:
        instruction, more = _field(record, "instruction", str, place), record.get("input") or ""
        if not isinstance(more, str):
            raise UserError(f'{place}: "input" is {type(more).__name__}, not a string')
        question = f"{instruction}\n\n{more}" if more else instruction
        answer = _field(record, "output", str, place)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if unread := next((name for name in ("tools", "functions", "history") if record.get(name)), None):
        raise UserError(
            f'{place}: its "{unread}" is not written into conversations; put it into messages, or remove it'
        )
    system = record.get("system")
    if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if not messages:
        raise UserError(f"{place}: a conversation without messages; remove it")
    return messages


def _field(record: Record, name: str, kind: Any, place: str) -> Any:
    if name not in record:
        raise UserError(
            f'{place}: no "{name}" field (it has: {shown_fields(record)}); data.format says what records are'
        )
    if kind is list and isinstance(record[name], str):  # a cell of a table, which holds no list
        try:
            record = {name: json.loads(record[name])}
        except (ValueError, RecursionError):
            raise UserError(f'{place}: "{name}" is a string that is no JSON; write a list, or a list as JSON') from None
    if not isinstance(record[name], kind):
        kinds = " or ".join(
            {str: "a string", list: "a list"}[one] for one in (kind if isinstance(kind, tuple) else (kind,))
        )
        raise UserError(f'{place}: "{name}" is {type(record[name]).__name__}, not {kinds}')
    return record[name]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f'{place}: {type(item).__name__}, not a message; write {{"role": ..., "content": ...}}')
    message = {name: value for name, value in item.items() if value is not None}  # tables fill up with nulls
    if "from" in message and "role" not in message:
        role = _ROLES.get(str(message.pop("from")))
        if role is None:
            raise UserError(f'{place}: from "{item["from"]}", which is none of {", ".join(_ROLES)}')
        message |= {"role": role, "content": message.pop("value", None)}
    if not isinstance(message.get("role"), str):
        raise UserError(f'{place}: no "role" (it has: {shown_fields(item)})')
    known = {*_ROLES.values(), "tool", "developer", "function"}
    if message["role"] not in known and (meant := nearest(message["role"], known, cutoff=0.8)):
        raise UserError(f'{place}: role "{message["role"]}"{meant}')
    marks = [name for name in ("weight", "train", "loss") if message.get(name, 1) not in (1, True)]
    if marks:
        raise UserError(
            f'{place}: its "{marks[0]}" is {message[marks[0]]}, and all answers are learnt alike; leave its '
            "conversation out, or this mark"
        )
    content = message.get("content", "" if "tool_calls" in message else None)
    if isinstance(content, list):
        parts = [part["text"] if isinstance(part, Mapping) and "text" in part else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(
                f"{place}: its content has a part that is no text (an image, a sound), which is not trained"
            )
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise UserError(f'{place}: "content" is {type(content).__name__}, not a string')
    if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
        raise UserError(f"{place}: has half a surrogate pair, which is no character")
    return message | {"content": content}


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as transformers renders it, and the special tokens that it may name."""

    text: str
    special: Mapping[str, Any]

    def render(self, messages: list[Message], place: str) -> tuple[str, list[Span]]:
        """The text of a conversation and where in it the answers are, the tokens that end them included.

        Answers are what the template puts into ``{% generation %}`` blocks. Without these, they are what an assistant's
        message adds to the conversation before it.

        Raises:
            UserError: the template refuses the conversation, or writes earlier messages otherwise once later ones come.
        """
        for name in _CONTENT:
            if name not in self.text and any(message.get(name) for message in messages):
                raise UserError(
                    f'{place}: the chat template does not write the "{name}" of a message; give another by '
                    "data.chat_template=FILE, or remove them"
                )
        if _GENERATION.search(self.text):
            return self._rendered(messages, place, spans=True)
        text, _ = self._rendered(messages, place)
        spans = [
            self._answer(text, messages, number, place)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        return text, spans

    def _answer(self, text: str, messages: list[Message], number: int, place: str) -> Span:
        before = messages[:number]
        prefixes = [self._rendered(before, place, prompt=prompt)[0] for prompt in (True, False)] if before else [""]
        prefix = next((prefix for prefix in prefixes if text.startswith(prefix)), None)
        if prefix is not None:
            whole = self._rendered(messages[: number + 1], place)[0]
            if text.startswith(whole):
                return len(prefix), len(whole)
            # Some leave the thoughts of an earlier answer out. What follows its words is the same.
            words = messages[number]["content"].rpartition("</think>")[2].strip()
            ending = words + whole[whole.rfind(words) + len(words) :]
            if words in whole and (at := text.find(ending, len(prefix))) >= 0:
                return len(prefix), at + len(ending)
        raise UserError(
            f"{place}: the chat template writes message {number} otherwise once more messages follow, so that it "
            "cannot be found; mark answers by {% generation %} in a template of your own, data.chat_template=FILE"
        )

    def _rendered(
        self, messages: list[Message], place: str, *, prompt: bool = False, spans: bool = False
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, found = render_jinja_template(
                conversations=[messages],
                chat_template=self.text,
                return_assistant_tokens_mask=spans,
                add_generation_prompt=prompt,
                **self.special,
            )
        except Exception as error:  # whatever a template raises
            raise UserError(f"{place}: the chat template refuses it ({one_line(error)[:160]})") from None
        return texts[0], list(found[0]) if spans else []  # pyright: ignore[reportReturnType]  # its own hint is wrong
