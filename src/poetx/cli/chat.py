"""``poetx chat``: a conversation with a fine-tuned model, by the chat template it was trained with."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from poetx.cli.quiet import quiet_transformers
from poetx.cli.runs import DEVICE, RUN, show_notes
from poetx.errors import UserError, one_line


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog='Examples: poetx chat runs/sft | echo "What is a list?" | poetx chat runs/sft')(chat)


def chat(
    run: RUN,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many likeliest tokens; 0: all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of the sampling.")] = 0,
    device: DEVICE = "auto",
) -> None:
    """Talk with a model that was trained on conversations.

    Each line of standard input is a question; /new begins a new conversation.
    """
    from poetx.runs.generate import generate_text
    from poetx.runs.load import load_run

    quiet_transformers()
    loaded = load_run(run, device=device)
    show_notes(loaded.notes)
    if not loaded.tokenizer.chat_template:
        raise UserError(
            f"{run}: was not trained on conversations (its tokenizer has no chat template); use poetx generate {run}"
        )
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages, turn = list(opening), 0
    if sys.stdin.isatty():
        print("Ctrl-D ends, /new begins a new conversation", file=sys.stderr)
    while (question := _question()) is not None:
        if question in ("", "/new"):
            messages = list(opening) if question else messages
            continue
        messages.append({"role": "user", "content": question})
        prompt = _rendered(loaded.tokenizer, messages, run)
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "seed": seed + turn}
        answer = generate_text(loaded, prompt, max_new_tokens=max_new_tokens, **options).strip()
        print(answer, flush=True)
        messages.append({"role": "assistant", "content": answer})
        turn += 1


def _question() -> str | None:
    """The next line, without the spaces around it; None at its end. Raises :class:`UserError`: no UTF-8."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input: not {error.encoding.upper()} text ({error.reason}); convert it first"
        ) from None


def _rendered(tokenizer: Any, messages: list[dict[str, str]], run: str) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
        raise UserError(f"{run}: its chat template refuses this conversation ({one_line(error)[:160]})") from None
