"""From text to tokens: a corpus is split and tokenized once, and found again by later runs.

The directory's key hashes the source files (path, size, modification time), the tokenizer settings and the format
version. Runs that start together on the same text wait for the one that tokenizes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from poetx.data.chat import DEFAULT_TEMPLATE, ChatTemplate
from poetx.data.encoding import encode
from poetx.data.packing import LABEL, Packer
from poetx.data.sources import Corpus, open_corpus
from poetx.data.split import Split, split_for
from poetx.data.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_CONFIG,
    embeddings_needed,
    find_end_of_text,
    load_tokenizer,
    read_tokenizer,
    tokenizer_file,
    train_tokenizer,
    whole_text,
)
from poetx.data.tokens import (
    FORMAT,
    META,
    PARTS,
    TOKENIZER,
    DataMeta,
    PreparedData,
    TokenWindows,
    fingerprint,
    open_tokens,
    token_files,
    verified_meta,
    window_count,
    write_meta,
)
from poetx.errors import UserError, one_line
from poetx.files import locked, new_directory, sha256
from poetx.recipe import Recipe
from poetx.recipe.sections import DataRecipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_CHARACTERS = 64 << 20  # a BPE learns nothing new from more text than this
Progress = Callable[[str], None]


def prepare_data(recipe: Recipe, *, progress: Progress | None = None) -> PreparedData:
    """Tokenize the recipe's text, or find the tokens of an earlier run, whole and undamaged.

    Args:
        progress: called with one line before each slow part.

    Raises:
        UserError: missing, empty or unreadable text, text that changes meanwhile or that the run would be written into,
            fewer tokens than one window, or a disk that is full.
    """
    data, say = recipe.data, progress or logger.info
    plan = plan_data(recipe, say)
    directory = plan.directory
    made = [path for path in (directory.parent, *directory.parent.parents) if not path.exists()]
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with locked(directory.with_name(f".{directory.name}.lock"), keep=False) as alone:
            meta = _found(directory, say) or _build(plan, data, say, alone=alone)
            _check_length(meta, data, plan.train)
    except BaseException:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    _remove_leftovers(directory.parent)
    return open_tokens(directory, meta, seq_len=data.seq_len)


def find_data(recipe: Recipe) -> tuple[DataPlan, DataMeta | None]:
    """Where the recipe's text is and what is known of its tokens, None where there are none yet; writes nothing.

    Raises:
        UserError: as :func:`prepare_data` does for text that cannot be read.
    """
    plan = plan_data(recipe, logger.info)
    meta = _found(plan.directory, logger.info)
    if meta is not None:
        _check_length(meta, recipe.data, plan.train)
    return plan, meta


@dataclass(frozen=True)
class DataPlan:
    """What a recipe's text is, and where its tokens are or will be.

    Attributes:
        source: the file of a tokenizer that is there; None: one is trained.
        template: that conversations are written by; None where there are none.
    """

    train: Corpus
    validation: Corpus | None
    source: Path | None
    template: ChatTemplate | None
    directory: Path


def plan_data(recipe: Recipe, say: Progress) -> DataPlan:
    """Find the recipe's text without writing anything. Raises as :func:`prepare_data` does."""
    data = recipe.data
    assert data.train is not None
    train = open_corpus(data.train, text_field=data.text_field, format=data.format)
    validation = None
    if data.validation:
        validation = open_corpus(
            data.validation, key="data.validation", text_field=data.text_field, format=data.format, split="validation"
        )
    _check_apart(recipe, train, "data.train")
    if validation:
        _check_apart(recipe, validation, "data.validation")
    if validation and (shared := set(train.files) & set(validation.files)):
        say(f"data.validation has {len(shared)} files of data.train ({min(shared).name}), which are trained on as well")
    tokenizer = data.tokenizer or recipe.model.pretrained
    source = tokenizer_file(tokenizer) if tokenizer else None
    template = None
    texts = (train, validation) if validation else (train,)
    if any(text.has_chats for text in texts):
        template = _chat_template(data, source)
    elif data.chat_template:
        say(f"data.chat_template={data.chat_template}: has no effect, there are no conversations")
    if data.text_field != "text" and not any(text.has_text_records for text in texts):
        say(f"data.text_field={data.text_field}: has no effect, there are no records with text")
    directory = recipe.cache_dir / f"data-{_key(data, train, validation, source, template)}"
    return DataPlan(train, validation, source, template, directory)


def _check_apart(recipe: Recipe, text: Corpus, key: str) -> None:
    """Refuse to write into the directory of the text: the next start would read what this one wrote, and not resume."""
    places = {"run_dir": recipe.directory, "data.cache_dir": recipe.cache_dir}
    for part, (name, place) in itertools.product(text.parts, places.items()):
        if part.top is None:
            continue
        top, place = part.top.expanduser().resolve(), place.expanduser().resolve()
        if place.is_relative_to(top) and not any(name.startswith(".") for name in place.relative_to(top).parts):
            raise UserError(
                f"{name}={place}: lies in {key}={part.source}, whose text it would become; give {name}=PATH outside of "
                "it, or put the text into a directory of its own"
            )


def encode_windows(source: str, tokenizer: Any, *, key: str, seq_len: int, text_field: str = "text") -> TokenWindows:
    """The windows of a corpus under a transformers tokenizer, for evaluation on other text than the run's own."""
    corpus = open_corpus(source, key=key, text_field=text_field)
    backend, end_id = whole_text(tokenizer.backend_tokenizer), tokenizer.eos_token_id
    if not corpus.has_chats:
        chunks = [item.ids for item in encode(corpus, Split(), backend, end_id, None)]
        return TokenWindows(np.concatenate(chunks) if chunks else np.empty(0, np.int64), seq_len=seq_len)
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template = ChatTemplate(tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_TEMPLATE, special)
    packer = Packer(seq_len, end_id)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for item in encode(corpus, Split(), backend, end_id, template):
        found += packer.add(item.ids, item.labels, ends=item.ends)
    ids, flags = map(np.concatenate, zip(*found, *packer.flush(), strict=True))
    return TokenWindows(ids, seq_len=seq_len, flags=flags, packed=True)


def _found(directory: Path, say: Progress) -> DataMeta | None:
    """The tokens of an earlier run; None where there are none, or damaged ones, which are made again."""
    if not (directory / META).exists():
        return None
    try:
        return verified_meta(directory)
    except UserError as error:
        say(f"{error}; making it again")
        return None


def _build(plan: DataPlan, data: DataRecipe, say: Progress, *, alone: bool) -> DataMeta:
    """Tokenize into the directory of ``plan``. ``alone``: nobody else does so at the same time."""
    directory, train, validation = plan.directory, plan.train, plan.validation
    source, template = plan.source, plan.template
    read = [corpus for corpus in (train, validation) if corpus]
    before = [_files(corpus) for corpus in read]
    split = Split() if validation else split_for(train, data.validation_fraction)
    if split.note:
        say(split.note)
    with new_directory(directory, remedy="run it again, or with another data.cache_dir=PATH", alone=alone) as temporary:
        tokenizer, end_of_text = _tokenizer(data, train, split, source, say)
        say("Tokenizing the text")
        (temporary / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
        if template:
            template, end_of_text = _settled(template, tokenizer, end_of_text, data)
        packed = _window_size(data, train, validation)
        meta = _write_tokens(temporary, train, validation, split, tokenizer, end_of_text, template, packed, say)
        for corpus, rows in zip(read, before, strict=True):
            if changed := [old[0] for old, new in zip(rows, _files(corpus), strict=True) if old != new]:
                raise UserError(f"{changed[0]}: has changed while it was read; run it again once nobody writes there")
        _check_split(meta, data, train.source)
        _check_length(meta, data, train)
        write_meta(temporary, meta)
    return meta


def _files(corpus: Corpus) -> list[list[str | int]]:
    return [row for part in corpus.parts for row in part.fingerprint()]


def _tokenizer(
    data: DataRecipe, train: Corpus, split: Split, source: Path | None, say: Progress
) -> tuple[Tokenizer, str]:
    if source is not None:
        tokenizer = read_tokenizer(source)
        return tokenizer, find_end_of_text(tokenizer, data.end_of_text, file=source)
    end_of_text = data.end_of_text or END_OF_TEXT
    say(f"Training a tokenizer of {data.vocab_size} tokens")
    tokenizer = train_tokenizer(_training_text(train, split), vocab_size=data.vocab_size, end_of_text=end_of_text)
    if (found := tokenizer.get_vocab_size()) < data.vocab_size:
        say(f"The text gives a tokenizer of {found} tokens, fewer than data.vocab_size={data.vocab_size}")
    return tokenizer, end_of_text


def _training_text(train: Corpus, split: Split) -> Iterator[str]:
    characters = 0
    for index, document in enumerate(train.documents(split.section)):
        if split.held_out(index):
            continue
        for piece in document:
            yield piece
            characters += len(piece)
            if characters >= TOKENIZER_CHARACTERS:
                return


def _write_tokens(
    directory: Path,
    train: Corpus,
    validation: Corpus | None,
    split: Split,
    tokenizer: Tokenizer,
    end_of_text: str,
    template: ChatTemplate | None,
    packed: int,
    say: Progress,
) -> DataMeta:
    """Write the files of tokens; ``packed``: documents lie in windows of so many tokens, 0: one after the other."""
    vocab_size = embeddings_needed(tokenizer)
    end_id = tokenizer.token_to_id(end_of_text)
    assert end_id is not None
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    labelled = bool(packed or template)
    names = token_files(labelled)
    digests = {name: hashlib.sha256() for name in names}
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    answers: dict[str, int] = dict.fromkeys(PARTS, 0)
    sizes = [0] * len(train.parts)
    packers: dict[str, Packer] = {part: Packer(packed, end_id) for part in PARTS}
    chats = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((directory / f"{name}.bin").open("wb")) for name in names}

        def append(part: str, source: int, ids: np.ndarray, flags: np.ndarray | None) -> None:
            for name, values in ((part, ids.astype(dtype)), (f"{part}-flags", flags)):
                if values is not None:
                    raw = values.tobytes()
                    files[name].write(raw)
                    digests[name].update(raw)
            counts[part] += len(ids)
            answers[part] += 0 if flags is None else int((flags & LABEL).sum())
            sizes[source] += len(ids) if part == "train" else 0

        def flush(part: str, source: int, *, end: bool) -> None:
            for window in packers[part].flush(end=end):
                append(part, source, *window)

        for corpus in (train, validation):
            source = 0
            for item in encode(corpus, split, tokenizer, end_id, template) if corpus else ():
                part = "validation" if item.held_out or corpus is validation else "train"
                chats += item.labels is not None
                if not packed:
                    flags = np.ones(len(item.ids), np.uint8) if item.labels is None else item.labels.astype(np.uint8)
                    append(part, item.source, item.ids, flags if labelled else None)
                    continue
                if item.source != source and corpus is train:
                    flush("train", source, end=bool(train.weights))  # no window has documents of two
                source = item.source
                for window in packers[part].add(item.ids, item.labels, ends=item.ends):
                    append(part, source, *window)
            if packed and corpus is train:
                flush("train", source, end=True)
        if packed:
            flush("validation", 0, end=True)
    for part, number in answers.items():
        if template and number == 0 and counts[part]:
            raise UserError(f"data.train={train.source}: no answers for {part}, which alone are learnt; give some")
    shares = [[size, weight] for size, weight in zip(sizes, train.weights or [], strict=False)]
    if packed:
        _tell_packing(packers.values(), chats, sum(counts.values()), packed, say)
    return DataMeta(
        format=FORMAT,
        dtype=dtype,
        vocab_size=vocab_size,
        end_of_text=end_of_text,
        end_of_text_id=end_id,
        train_tokens=counts["train"],
        validation_tokens=counts["validation"],
        fingerprint=fingerprint((digest.hexdigest() for digest in digests.values()), shares),
        shares=shares or (),
        labelled=labelled,
        packed=packed,
        template=template.text if template else "",
    )


def _tell_packing(packers: Iterable[Packer], chats: int, tokens: int, size: int, say: Progress) -> None:
    used, cut, dropped = (sum(getattr(packer, name) for packer in packers) for name in ("tokens", "cut", "dropped"))
    text = f"{tokens // size} windows of {size} tokens, {1 - used / max(1, tokens):.0%} of them padding"
    if chats:
        text = f"{chats} conversations in {text}"
    if cut:
        text += f"; {cut} conversations are longer than data.seq_len={size} and were cut"
    if dropped:
        text += f"; {dropped} are left out because no answer is in what fits"
    say(text)


def _window_size(data: DataRecipe, train: Corpus, validation: Corpus | None) -> int:
    """Tokens of a window into which documents are packed; 0 where they are not: unless told, texts are not."""
    packs = data.pack if data.pack is not None else train.has_chats or bool(validation and validation.has_chats)
    return data.seq_len if packs else 0


def _chat_template(data: DataRecipe, source: Path | None) -> ChatTemplate:
    """The tokenizer's chat template, unless the recipe gives one; a plain one where there is none."""
    text, special = None, {}
    if source is not None and (source.parent / TOKENIZER_CONFIG).is_file():
        tokenizer = load_tokenizer(source.parent)
        special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        text = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if data.chat_template:
        try:
            text = Path(data.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template={data.chat_template}: cannot be read ({one_line(error)})") from None
    return ChatTemplate(text or DEFAULT_TEMPLATE, special)


def _settled(
    template: ChatTemplate, tokenizer: Tokenizer, end_of_text: str, data: DataRecipe
) -> tuple[ChatTemplate, str]:
    """The template with its end token, and the token that ends answers: generation must stop there."""
    if template.text == DEFAULT_TEMPLATE:
        return replace(template, special={**template.special, "eos_token": end_of_text}), end_of_text
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text, spans = template.render(asked, "a conversation of one question and one answer")
    added = tokenizer.get_added_tokens_decoder()
    ids = tokenizer.encode(text[slice(*spans[-1])] if spans else "", add_special_tokens=False).ids
    ends = [added[number].content for number in ids if number in added]
    return template, data.end_of_text or (ends[-1] if ends else end_of_text)


def _key(
    data: DataRecipe, train: Corpus, validation: Corpus | None, source: Path | None, template: ChatTemplate | None
) -> str:
    status = source.stat() if source else None
    parts: dict[str, Any] = {
        "format": FORMAT,
        "train": _identity(train),
        "validation": _identity(validation) if validation else data.validation_fraction,
        "tokenizer": [str(source), status.st_size, status.st_mtime_ns] if status else data.vocab_size,
        "end_of_text": data.end_of_text,
    }
    if data.text_field != "text":
        parts["text_field"] = data.text_field
    if size := _window_size(data, train, validation):
        parts["packed"] = [size]
    if source is not None and (source.parent / TOKENIZER_CONFIG).is_file():  # it names the end of text
        parts["beside the tokenizer"] = sha256(source.parent / TOKENIZER_CONFIG)
    if template:
        parts["chats"] = [
            template.text,
            *(part.format for corpus in (train, validation) if corpus for part in corpus.parts),
        ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _identity(corpus: Corpus) -> list[Any]:
    rows = [[part.kind, part.fingerprint(), part.weight] for part in corpus.parts]
    return rows[0][:2] if len(rows) == 1 else rows


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove half-written data of processes that no longer hold its lock."""
    for path in cache_dir.glob(".data-*.tmp-*"):
        lock = path.with_suffix(".lock")
        with contextlib.suppress(OSError, UserError), locked(lock, busy="in use", keep=False) as alone:
            if alone:
                shutil.rmtree(path, ignore_errors=True)


def _check_split(meta: DataMeta, data: DataRecipe, source: str) -> None:
    if meta.train_tokens == 0:
        raise UserError(f"data.train={source}: no text to train on")
    if meta.validation_tokens == 0:
        if data.validation:
            raise UserError(f"data.validation={data.validation}: there is no text in it")
        raise UserError(
            f"data.validation_fraction={data.validation_fraction}: the documents that it holds out of "
            f"data.train={source} are empty; change it, or give data.validation=PATH"
        )


def _check_length(meta: DataMeta, data: DataRecipe, train: Corpus) -> None:
    if data.validation:
        validation, remedy = f"validation text (data.validation={data.validation})", "give more text"
    else:
        validation, remedy = "validation text", "raise data.validation_fraction, give data.validation=PATH"
    what = "packed conversations" if meta.template else "packed text"
    for part, tokens in (("train", meta.train_tokens), ("validation", meta.validation_tokens)) if meta.packed else ():
        if window_count(tokens, data.seq_len) == 0:
            raise UserError(
                f"data.train={train.source}: no {what} for {part}; give more, with answers, or raise data.seq_len"
            )
    training = [("training text", meta.train_tokens)]
    if meta.shares:
        training = [
            (f"training text of {part.source}", int(size))
            for part, (size, _) in zip(train.parts, meta.shares, strict=True)
        ]
    for part, tokens, remedies in (
        *((part, tokens, "give more text") for part, tokens in training),
        (validation, meta.validation_tokens, remedy),
    ):
        if window_count(tokens, data.seq_len) == 0:
            raise UserError(
                f"the {part} has {tokens} tokens, fewer than one window of data.seq_len={data.seq_len} + 1; "
                f"{remedies} or lower data.seq_len"
            )
