"""Conversations: every way to write them, answers alone in the loss, no document that sees another."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders import gpt2, llama, train_losses
from poetx.cli import main
from poetx.data.chat import DEFAULT_TEMPLATE, ChatTemplate, conversation, format_of
from poetx.data.packing import LABEL, START, Packer
from poetx.data.prepare import prepare_data
from poetx.data.tokenizer import read_tokenizer, train_tokenizer
from poetx.data.tokens import IGNORED, TokenWindows
from poetx.errors import UserError
from poetx.recipe import Recipe
from poetx.runs.evaluate import evaluate_run
from poetx.runs.load import load_run
from poetx.train.packing import check_packing
from poetx.train.run import train

Tiny = Callable[..., Recipe]
#: As Qwen 3 has it: an earlier answer's thoughts are left out, the last one's begin even where there are none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].strip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def record(kind: str, question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": {"id": 3, "messages": [m | {"name": None} for m in turns(question, answer)]},
        "parts": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": question}]}, turns("", answer)[1]]
        },
        "sharegpt": {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        "prompt": {"prompt": question, "completion": answer},
        "prompts": {"prompt": turns(question), "completion": turns("", answer)[1:]},
        "alpaca": {"instruction": question, "input": "", "output": answer},
    }[kind]


@pytest.fixture
def chats(tmp_path: Path) -> Callable[..., Path]:
    def write(kind: str = "messages", count: int = 40, words: int = 3) -> Path:
        path = tmp_path / f"{kind}.jsonl"
        rows = [record(kind, f"what is {n}", f"it is {n} " * words) for n in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return [f"data.cache_dir={tmp_path / 'cache'}", "data.seq_len=64", "data.validation_fraction=0.1"]


@pytest.mark.parametrize("kind", ["parts", "sharegpt", "prompt", "prompts", "alpaca"])
def test_every_way_to_write_a_conversation_is_the_same(
    kind: str, tiny: Tiny, chats: Callable[..., Path], settings: list[str]
) -> None:
    expected = prepare_data(tiny(f"data.train={chats()}", *settings)).meta
    assert prepare_data(tiny(f"data.train={chats(kind)}", *settings)).meta.fingerprint == expected.fingerprint


def test_answers_alone_are_labels_and_positions_begin_anew(
    tiny: Tiny, chats: Callable[..., Path], settings: list[str]
) -> None:
    said: list[str] = []
    data = prepare_data(tiny(f"data.train={chats()}", *settings), progress=said.append)
    assert "40 conversations in" in said[-1]
    tokenizer = read_tokenizer(data.tokenizer_file)
    found = []
    for windows in (data.train, data.validation):
        batch = windows.batch(list(range(len(windows))))
        assert windows.counted(range(len(windows))) == batch.counted > 0
        assert batch.position_ids is not None
        for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
            starts = [*torch.where(positions == 0)[0].tolist(), len(ids)]
            for first, end in itertools.pairwise(starts):
                assert positions[first:end].tolist() == list(range(end - first))
                own = labels[first:end]
                answer = tokenizer.decode(own[own != IGNORED].tolist(), skip_special_tokens=False)
                text = tokenizer.decode(ids[first:end].tolist(), skip_special_tokens=False)
                if answer:  # the rest is padding
                    found.append((text, answer))
    expected = [(f"it is {n} " * 3 + "<|endoftext|>", f"### user\nwhat is {n}\n### assistant\n") for n in range(40)]
    assert sorted(found) == sorted((f"{prompt}{answer}\n", answer) for answer, prompt in expected)
    assert tokenizer.decode(data.validation.prompt()).endswith("### assistant\n")


def test_what_is_too_long_is_cut_and_what_has_no_answer_left_is_left_out_and_both_are_said(
    tiny: Tiny, tmp_path: Path, settings: list[str]
) -> None:
    rows = [record("messages", "what", "it is " * 60)] * 5 + [record("messages", "what " * 90, "it")] * 3
    rows += [record("messages", "what", "it")] * 20 + [{"messages": turns("what")}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    prepare_data(tiny(f"data.train={path}", *settings), progress=said.append)
    assert "8 conversations are longer than data.seq_len=64 and were cut; 4 are left out" in said[-1]


def test_chats_that_are_not_packed_lie_one_after_the_other(
    tiny: Tiny, chats: Callable[..., Path], settings: list[str]
) -> None:
    data = prepare_data(tiny(f"data.train={chats()}", *settings, "data.pack=false"))
    batch = data.train.batch(list(range(len(data.train))))
    assert batch.position_ids is None
    assert 0 < batch.counted < batch.labels.numel()
    packed = prepare_data(tiny(f"data.train={chats()}", *settings))
    assert packed.train.flags is not None
    assert data.train.flags is not None
    assert data.meta.train_tokens < packed.meta.train_tokens  # no padding
    assert data.train.flags.sum() == (packed.train.flags & LABEL).sum()


def test_text_that_is_packed_loses_nothing_but_labels_of_first_tokens(tiny: Tiny, settings: list[str]) -> None:
    plain, packed = (prepare_data(tiny(*settings, f"data.pack={pack}")) for pack in ("null", "true"))
    assert plain.train.flags is None
    assert plain.meta.written().keys().isdisjoint({"packed", "labelled"})
    before, now = (Counter(data.train.tokens.tolist()) for data in (plain, packed))
    assert not before - now
    assert set(now - before) == {packed.meta.end_of_text_id}  # padding


def test_packed_sources_without_weights_keep_to_their_windows(
    tiny: Tiny, chats: Callable[..., Path], settings: list[str], corpus: Path, tmp_path: Path
) -> None:
    sources = [str(chats()), str(corpus)]
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text("".join(f'{{"text": "{n} of {number}"}}\n' for n in range(90)))
        sources.append(str(tmp_path / f"{number}.jsonl"))
    data = prepare_data(tiny(f"data.train={json.dumps(sources)}", *settings))
    assert data.train.flags is not None
    assert (data.train.flags[::64] & START).all()  # every window begins with a document
    assert len(data.train.tokens) % 64 == 1


def test_a_mixture_of_conversations_and_text(
    tiny: Tiny, chats: Callable[..., Path], settings: list[str], corpus: Path
) -> None:
    data = prepare_data(tiny(f"data.train={json.dumps({str(chats()): 1, str(corpus): 1})}", *settings))
    sizes = [int(size) for size, _ in data.meta.shares]
    assert sum(sizes) == data.meta.train_tokens
    assert [size % 64 for size in sizes] == [1, 1]  # whole windows, and the token that the last label needs
    assert [count for count, _ in data.train.order] == [size // 64 for size in sizes]


@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_document_in_a_window_is_the_document_alone(model: Callable[[], Any], implementation: str) -> None:
    made = model()
    made.set_attn_implementation(implementation)
    check_packing(made)
    packer, documents = Packer(24, 0), [np.arange(5) + 7, np.arange(9) + 30, np.arange(7) + 60]
    found = [window for ids in documents for window in packer.add(ids, np.ones(len(ids)), ends=True)]
    ids, flags = map(np.concatenate, zip(*found, *packer.flush(), strict=True))
    batch = TokenWindows(ids, seq_len=24, flags=flags, packed=True).batch([0])
    with torch.no_grad():
        logits = made(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        for document, first in zip(documents, (0, 5, 14), strict=True):
            alone = made(torch.from_numpy(document)[None]).logits[0]
            assert torch.allclose(logits[first : first + len(document)], alone, atol=1e-5)


def test_a_model_that_mixes_documents_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, state_size=8)
    with pytest.raises(UserError, match=r"^data\.pack: .*Mamba.*; use data\.pack=false"):
        check_packing(MambaForCausalLM(config))
    with pytest.raises(UserError, match=r"^data\.pack: .*Bloom.*; use data\.pack=false"):
        check_packing(BloomForCausalLM(BloomConfig(vocab_size=90, hidden_size=32, n_layer=1, n_head=2)))


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (THINKING, ["b<|im_end|>\n", "<think>\n\n</think>\n\nd<|im_end|>\n"]),
        (
            "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}",
            ["[assistant] b</s>", "[assistant] d</s>"],
        ),
        (DEFAULT_TEMPLATE, ["b<e>", "d<e>"]),
    ],
)
def test_answers_are_found_in_what_a_template_writes(template: str, answers: list[str]) -> None:
    text, spans = ChatTemplate(template, {"eos_token": "<e>"}).render(turns("a", "b", "c", "d"), "here")
    assert [text[first:end] for first, end in spans] == answers


def test_a_template_that_rewrites_what_was_said_is_refused() -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(
        UserError, match=r"^here: the chat template writes message 1 otherwise.*data\.chat_template=FILE"
    ):
        ChatTemplate(template, {}).render(turns("a", "b", "c"), "here")
    with pytest.raises(UserError, match=r"^here: the chat template refuses it \(no system\)"):
        ChatTemplate("{{ raise_exception('no system') }}", {}).render(turns("a", "b"), "here")


def test_the_tokenizers_own_template_and_the_token_that_ends_its_answers(
    tiny: Tiny, tmp_path: Path, chats: Callable[..., Path], settings: list[str]
) -> None:
    """Generation must stop where answers end, whatever the tokenizer's configuration says."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    own = train_tokenizer(["what is 3\nit is 3"], vocab_size=300)
    own.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    place = tmp_path / "tokenizer"
    made = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|endoftext|>")
    made.chat_template = THINKING
    made.save_pretrained(place)
    run = train(tiny(f"data.train={chats()}", f"data.tokenizer={place}", *settings, "train.steps=2"))
    saved = AutoTokenizer.from_pretrained(run.export_dir)
    assert saved.eos_token == "<|im_end|>"
    assert saved.get_chat_template() == THINKING
    prompt = saved.decode(run.first_validation_tokens)
    assert prompt == f"<|im_start|>user\n{prompt.split()[1]} is {prompt.split()[3].removesuffix('<|im_end|>')}" + (
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert run.chats


@pytest.mark.parametrize("method", ["fast", "mem", "single-step", "adamw", "lora"])
def test_every_method_learns_answers(method: str, tiny: Tiny, chats: Callable[..., Path], settings: list[str]) -> None:
    """The same with chunked loss, checkpointed layers and micro-batches."""
    common = [f"data.train={chats()}", *settings, f"method={method}", "train.export=false", "train.steps=6"]
    plain = train(tiny(*common, run_dir="plain"))
    saving = ["train.chunked_loss=true", "model.gradient_checkpointing=true", "train.micro_batch_size=1"]
    lean = train(tiny(*common, *saving, run_dir="lean"))
    losses = train_losses(plain.run_dir)
    assert train_losses(lean.run_dir) == pytest.approx(losses, rel=2e-3)
    if method != "lora":  # adapters on random weights
        assert plain.last_perplexity < plain.first_perplexity


def test_a_run_on_conversations_is_evaluated_and_resumed(
    tiny: Tiny, chats: Callable[..., Path], settings: list[str]
) -> None:
    mixed = f"data.train={json.dumps({str(chats()): 2, str(chats('alpaca')): 1})}"
    keys = [mixed, *settings, "train.steps=4", "train.checkpoint_every=2"]
    whole = train(tiny(*keys, run_dir="whole"))
    parts = tiny(*keys, run_dir="parts")
    train(parts)
    (parts.directory / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    assert train_losses(train(parts, resume=True).run_dir) == train_losses(whole.run_dir)
    own = evaluate_run(str(whole.run_dir), data=None, device="cpu")
    assert own.perplexity == pytest.approx(whole.last_perplexity, rel=1e-3)
    assert own.tokens < 40 * 12  # answers alone
    other = evaluate_run(str(whole.run_dir), data=str(chats("prompt")), device="cpu")
    assert other.loss == pytest.approx(own.loss, rel=0.5)
    with pytest.raises(UserError, match=r"^--seq-len=16: the run's documents are packed into 64 tokens"):
        evaluate_run(str(whole.run_dir), data=None, seq_len=16, device="cpu")
    assert load_run(str(whole.export_dir), device="cpu").tokenizer.get_chat_template() == DEFAULT_TEMPLATE


def test_ids_beyond_16_bits_are_batches(
    tiny: Tiny, tmp_path: Path, chats: Callable[..., Path], settings: list[str]
) -> None:
    content = json.loads(train_tokenizer(["what is 3\nit is 3"], vocab_size=300).to_str())
    content["model"]["vocab"]["#"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    data = prepare_data(tiny(f"data.train={chats()}", f"data.tokenizer={tmp_path}", *settings))
    assert data.train.tokens.dtype == np.uint32
    assert data.train.batch([0]).input_ids.max() == 70_000


MALFORMED: dict[str, tuple[Any, str]] = {
    "no-role": ({"messages": [{"content": "a"}]}, r'messages\[0\]: no "role" \(it has: content\)'),
    "misspelt": ({"messages": [{"role": "Assistant", "content": "a"}]}, 'role "Assistant"; did you mean .assistant.'),
    "no-content": ({"messages": [{"role": "user"}]}, r'messages\[0\]: "content" is NoneType, not a string'),
    "number": ({"messages": [{"role": "user", "content": 3}]}, r'"content" is int, not a string'),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part that is no text"),
    "text-message": ({"messages": ["a"]}, r"messages\[0\]: str, not a message; write"),
    "no-messages": ({"messages": []}, "a conversation without messages; remove it"),
    "string": ({"messages": "a"}, '"messages" is a string that is no JSON; write a list'),
    "repr": ({"messages": str(turns("a", "b"))}, '"messages" is a string that is no JSON'),
    "json-no-list": ({"messages": "3"}, '"messages" is int, not a list'),
    "speaker": ({"conversations": [{"from": "ocr", "value": "a"}]}, r'from "ocr", which is none of human'),
    "no-value": ({"conversations": [{"from": "human"}]}, r'"content" is NoneType'),
    "output": ({"instruction": "a", "output": None}, r'"output" is NoneType, not a string'),
    "input": ({"instruction": "a", "input": 3, "output": "b"}, r'"input" is int, not a string'),
    "completion": ({"prompt": "a", "completion": {"a": 1}}, r'"completion" is dict, not a string or a list'),
    "tools": ({"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}, '"tools" is not written'),
    "history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, '"history" is not written into'),
    "weight": (
        {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
        r"messages\[0\]: its \"weight\" is 0, and all answers are learnt alike",
    ),
    "share": ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, 'its "weight" is 0.5, and all'),
    "loss": ({"messages": [{"role": "assistant", "content": "a", "loss": False}]}, 'its "loss" is False, and all'),
    "call": ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, 'does not write the "tool_calls"'),
    "thought": (
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b", "reasoning_content": "c"}]},
        'does not write the "reasoning_content" of a message; give another by data.chat_template=FILE',
    ),
    "surrogate": ({"prompt": "a", "completion": [{"role": "assistant", "content": "\ud800"}]}, "half a surrogate pair"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_wrong_in_a_conversation_is_one_line(
    name: str, tiny: Tiny, tmp_path: Path, settings: list[str]
) -> None:
    content, message = MALFORMED[name]
    path = tmp_path / f"{name}.jsonl"
    whole = {k: v for k, v in record("messages", "a", "b").items() if k in content}
    kind = format_of(content, "text")
    good = {"messages": "messages", "sharegpt": "sharegpt", "alpaca": "alpaca", "prompt": "prompt"}[kind]
    path.write_text(json.dumps(whole or record(good, "a", "b")) + "\n" + json.dumps(content) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        prepare_data(tiny(f"data.train={path}", *settings))
    assert str(caught.value).startswith(f"{path}, line 2")
    assert "\n" not in str(caught.value)


def test_answers_that_all_lie_behind_the_cut_are_refused_for_that(
    tiny: Tiny, tmp_path: Path, settings: list[str]
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"messages": turns(f"{n}" * 200, "yes")}) + "\n" for n in range(10, 90)))
    with pytest.raises(UserError, match=r"conversations for train is longer than data\.seq_len=16 and cut before its"):
        prepare_data(tiny(f"data.train={path}", *settings, "data.seq_len=16"))


def test_conversations_as_json_in_the_cells_of_a_table(
    tiny: Tiny, tmp_path: Path, settings: list[str], chats: Callable[..., Path]
) -> None:
    records = [json.loads(line) for line in chats().read_text().splitlines()]
    path = tmp_path / "chats.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "messages"])
        rows.writerows([number, json.dumps(record["messages"])] for number, record in enumerate(records))
    written, wanted = (prepare_data(tiny(f"data.train={text}", *settings)) for text in (path, chats()))
    assert written.meta.fingerprint == wanted.meta.fingerprint


@pytest.mark.parametrize("held_out", [False, True])
def test_conversations_without_answers_are_refused(
    held_out: bool, tiny: Tiny, tmp_path: Path, settings: list[str], chats: Callable[..., Path]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"messages": turns(f"what is {n}")}) + "\n" for n in range(90)))
    texts = [f"data.train={chats()}", f"data.validation={path}"] if held_out else [f"data.train={path}"]
    settings = [setting for setting in settings if not (held_out and "fraction" in setting)]
    with pytest.raises(UserError, match=f"no answers for {'validation' if held_out else 'train'}, which alone are"):
        prepare_data(tiny(*texts, *settings, "data.pack=false"))


def test_fields_say_what_a_record_is_and_a_key_says_otherwise(
    tiny: Tiny, chats: Callable[..., Path], settings: list[str], corpus: Path
) -> None:
    assert format_of({"text": "a", "messages": []}, "text") == "text"
    assert format_of({"text": "a", "messages": []}, "body") == "messages"
    assert conversation({"prompt": "a", "completion": "b", "system": "c"}, "prompt", "")[0]["role"] == "system"
    with pytest.raises(
        UserError, match=r'line 1: no "messages" field \(it has: instruction, input, output\); data\.format'
    ):
        prepare_data(tiny(f"data.train={chats('alpaca')}", *settings, "data.format=messages"))
    with pytest.raises(UserError, match=r"data\.format=messages: .* is text, which has no records"):
        prepare_data(tiny(f"data.train={corpus}", "data.format=messages"))


def test_a_finished_run_answers_the_datas_own_question(
    chats: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: Tiny, settings: list[str]
) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text(tiny(f"data.train={chats()}", *settings, "train.steps=2").to_yaml())
    assert main(["train", str(path)]) == 0
    out = capsys.readouterr().out
    assert "the model continues:\n### user\nwhat is" in out
    assert "40 conversations in" in out


def test_fine_tuning_works_out_of_the_box(tiny: Tiny, tmp_path: Path, chats: Callable[..., Path]) -> None:
    from poetx.recipe import load_recipe

    base = train(tiny("data.seq_len=64", "train.steps=2"))
    small = ["data.seq_len=64", "train.steps=3", "train.batch_size=2", f"run_dir={tmp_path / 'sft'}"]
    recipe = load_recipe("sft", [f"model.pretrained={base.export_dir}", f"data.train={chats()}", *small])
    tuned = train(recipe)
    assert tuned.last_perplexity < tuned.first_perplexity
    assert tuned.chats
    untouched, trained = tuned.samples
    for first, last in zip(untouched, trained, strict=True):
        assert first["prompt"] == last["prompt"]
        assert first["prompt"].endswith("### assistant\n")
        assert first["answer"] == last["answer"] != ""
