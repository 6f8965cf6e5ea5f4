"""From text to tokens: a corpus is split and tokenized once, and found again by later runs.

The directory's key hashes the source files (path, size, times), the tokenizer with its settings and the format
version. Runs that start together on the same text wait for the one that tokenizes it.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from poetx.data.chat import DEFAULT_TEMPLATE, ChatTemplate
from poetx.data.encoding import encode
from poetx.data.packing import Packer
from poetx.data.sources import Corpus, open_corpus
from poetx.data.split import Split, split_for
from poetx.data.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_CONFIG,
    dropped_characters,
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
    TOKENIZER,
    DataMeta,
    PreparedData,
    TokenWindows,
    open_tokens,
    verified_meta,
    window_count,
    write_meta,
)
from poetx.data.writing import PROGRESS, write_tokens
from poetx.errors import UserError, one_line
from poetx.files import locked, new_directory, sha256, write_text
from poetx.recipe import Recipe
from poetx.recipe.places import is_prepared
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
    if is_prepared(data.train):
        return _open_prepared(recipe)
    plan = plan_data(data, recipe.model.pretrained, _places(recipe), say)
    directory = recipe.cache_dir / f"data-{plan.key}"
    made = [path for path in (directory.parent, *directory.parent.parents) if not path.exists()]
    try:
        meta = _found(directory, lambda damage: None)  # what is whole needs no lock, which needs a place to write to
        if meta is None:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with locked(directory.with_name(f".{directory.name}.lock"), keep=False) as alone:
                if (meta := _found(directory, say)) is None:
                    remedy = "run it again, or with another data.cache_dir=PATH"
                    with new_directory(directory, remedy=remedy, alone=alone) as temporary:
                        meta = build(plan, data, temporary, say)
        _check_length(meta, data, plan.train)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # not empty, or gone already
                path.rmdir()
        raise
    _remove_leftovers(directory.parent)
    return open_tokens(directory, meta, seq_len=data.seq_len)


@dataclass(frozen=True)
class FoundData:
    """A recipe's text, and what is known of its tokens."""

    source: str
    files: list[Path]
    directory: Path
    meta: DataMeta | None  # None: not tokenized yet


def find_data(recipe: Recipe) -> FoundData:
    """Where the recipe's text is, and its tokens if there are any; writes nothing. Raises as :func:`prepare_data`."""
    if is_prepared(recipe.data.train):
        data = _open_prepared(recipe)
        return FoundData(str(data.directory), [], data.directory, data.meta)
    plan = plan_data(recipe.data, recipe.model.pretrained, _places(recipe), logger.info)
    directory = recipe.cache_dir / f"data-{plan.key}"
    meta = _found(directory, logger.info)
    if meta is not None:
        _check_length(meta, recipe.data, plan.train)
    return FoundData(plan.train.source, plan.train.files, directory, meta)


@dataclass(frozen=True)
class DataPlan:
    """What a text is, and how it becomes tokens.

    Attributes:
        source: the file of a tokenizer that is there; None: one is trained.
        template: that conversations are written by; None where there are none.
        key: of all that decides the tokens.
    """

    train: Corpus
    validation: Corpus | None
    source: Path | None
    template: ChatTemplate | None
    key: str


#: Characters of the text that are looked through for what a tokenizer leaves out.
_LOOKED_THROUGH = 200_000


def plan_data(data: DataRecipe, pretrained: str | None, places: Mapping[str, Path], say: Progress) -> DataPlan:
    """Find the text without writing anything. Raises as :func:`prepare_data` does.

    Args:
        pretrained: the model whose tokenizer is taken where ``data`` names none.
        places: where will be written, by name: in none of them may the text be.
    """
    assert data.train is not None
    train = open_corpus(data.train, text_field=data.text_field, format=data.format)
    validation = None
    if data.validation:
        validation = open_corpus(
            data.validation, key="data.validation", text_field=data.text_field, format=data.format, split="validation"
        )
    _check_apart(places, train, "data.train")
    if validation:
        _check_apart(places, validation, "data.validation")
    if validation and (shared := _shared(train.files, validation.files)):
        say(f"data.validation has {len(shared)} files of data.train ({min(shared).name}), which are trained on as well")
    tokenizer, key = (data.tokenizer, "data.tokenizer") if data.tokenizer else (pretrained, "model.pretrained")
    source = tokenizer_file(tokenizer, key) if tokenizer else None
    if source and pretrained and data.tokenizer and not _same_words(source, Path(pretrained) / TOKENIZER):
        say(f"data.tokenizer={tokenizer}: is not that of model.pretrained, to which its tokens mean other words")
    template = None
    texts = (train, validation) if validation else (train,)
    if any(text.has_chats for text in texts):
        template = _chat_template(data, source)
    elif data.chat_template:
        say(f"data.chat_template={data.chat_template}: has no effect, there are no conversations")
    if data.text_field != "text" and not any(text.has_text_records for text in texts):
        say(f"data.text_field={data.text_field}: has no effect, there are no records with text")
    return DataPlan(train, validation, source, template, _key(data, train, validation, source, template))


def _shared(files: Iterable[Path], others: Iterable[Path]) -> list[Path]:
    """Those of ``others`` that are among ``files``, by whatever name, or have the same bytes as one of them."""
    by_size: dict[int, list[Path]] = {}
    for file in files:
        by_size.setdefault(file.stat().st_size, []).append(file)

    def has_twin(file: Path) -> bool:
        alike = by_size.get(file.stat().st_size or -1, ())  # empty files share nothing
        return any(file.samefile(one) or filecmp.cmp(file, one, shallow=False) for one in alike)

    return [file for file in others if has_twin(file)]


def _same_words(tokenizer: Path, other: Path) -> bool:
    """Whether two tokenizers' files differ at most in what one of them has more; or the other is not there."""
    if not other.is_file() or sha256(tokenizer) == sha256(other):
        return True
    fewer, more = sorted((read_tokenizer(file).get_vocab() for file in (tokenizer, other)), key=len)
    return fewer.items() <= more.items()


def _places(recipe: Recipe) -> dict[str, Path]:
    return {"run_dir": recipe.directory, "data.cache_dir": recipe.cache_dir}


def _open_prepared(recipe: Recipe) -> PreparedData:
    """The tokens of a directory that ``poetx data`` made, found to be whole and of the model's own tokenizer."""
    data, directory = recipe.data, Path(str(recipe.data.train))
    what = f"data.train={directory}"
    meta = verified_meta(directory)
    if data.validation or data.tokenizer or data.chat_template:
        key = next(key for key in ("validation", "tokenizer", "chat_template") if getattr(data, key))
        raise UserError(f"data.{key}: {what} is prepared and has its own; leave it out, or give it to poetx data")
    if recipe.model.pretrained:
        own, its = (read_tokenizer(tokenizer_file(place)) for place in (str(directory), recipe.model.pretrained))
        if own.to_str() != its.to_str():
            raise UserError(
                f"{what}: prepared with another tokenizer than that of model.pretrained={recipe.model.pretrained}; "
                "prepare it again with data.tokenizer=" + recipe.model.pretrained
            )
    if meta.packed and meta.packed != data.seq_len:
        raise UserError(f"data.seq_len={data.seq_len}: {what} is packed into windows of {meta.packed}; set it to that")
    for part, tokens in (("training", meta.train_tokens), ("validation", meta.validation_tokens)):
        if window_count(tokens, data.seq_len) == 0:
            raise UserError(f"{what}: {tokens} tokens of {part} text, fewer than data.seq_len={data.seq_len} + 1")
    return open_tokens(directory, meta, seq_len=data.seq_len)


def _check_apart(places: Mapping[str, Path], text: Corpus, key: str) -> None:
    """Refuse to write into the directory of the text: the next start would read what this one wrote, and not resume."""
    for part, (name, place) in itertools.product(text.parts, places.items()):
        if part.top is None:
            continue
        top, place = part.top.expanduser().resolve(), place.expanduser().resolve()
        if place.is_relative_to(top) and not any(name.startswith(".") for name in place.relative_to(top).parts):
            raise UserError(
                f"{name}={place}: lies in {key}={part.source}, whose text it would become; give {name}=PATH outside of "
                "it, or put the text into a directory of its own"
            )


def encode_windows(source: Any, tokenizer: Any, *, key: str, seq_len: int, text_field: str = "text") -> TokenWindows:
    """The windows of a corpus, as ``data.train`` names one, under a transformers tokenizer, for evaluation on it."""
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


def build(plan: DataPlan, data: DataRecipe, directory: Path, say: Progress, *, resumable: bool = False) -> DataMeta:
    """Tokenize into ``directory``, which is there; ``resumable``: go on from what an earlier process left in it."""
    train, validation, template = plan.train, plan.validation, plan.template
    read = [corpus for corpus in (train, validation) if corpus]
    before = [_files(corpus) for corpus in read]
    split = Split() if validation else split_for(train, data.validation_fraction)
    if split.note:
        say(split.note)
    own = plan.source
    if resumable and own is None and (directory / PROGRESS).is_file():
        own = directory / TOKENIZER
    tokenizer, end_of_text = _tokenizer(data, train, split, own, say)
    if plan.source and (lost := dropped_characters(tokenizer, _training_text(train, split, _LOOKED_THROUGH))):
        say(
            f"{plan.source}: its tokenizer has no token for {', '.join(map(repr, lost[:6]))}"
            f"{f' and {len(lost) - 6} more characters' * (len(lost) > 6)} and leaves them out; use one with byte "
            "fallback or an unknown token"
        )
    say("Tokenizing the text")
    write_text(directory / TOKENIZER, tokenizer.to_str())
    if template:
        template, end_of_text = _settled(template, tokenizer, end_of_text, data)
    packed = window_size(data, train, validation)
    meta = write_tokens(
        directory, train, validation, split, tokenizer, end_of_text, template, packed, say, resumable=resumable
    )
    for corpus, rows in zip(read, before, strict=True):
        if changed := [old[0] for old, new in zip(rows, _files(corpus), strict=True) if old != new]:
            raise UserError(f"{changed[0]}: has changed while it was read; run it again once nobody writes there")
    _check_split(meta, data, train.source)
    alone = resumable and not meta.packed  # windows are cut by who trains on it
    _check_length(meta, data.model_copy(update={"seq_len": 1}) if alone else data, train)
    write_meta(directory, meta)
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


def _training_text(train: Corpus, split: Split, most: int = TOKENIZER_CHARACTERS) -> Iterator[str]:
    characters = 0
    for index, document in enumerate(train.documents(split.section)):
        if split.held_out(index):
            continue
        for piece in document:
            yield piece
            characters += len(piece)
            if characters >= most:
                return


def window_size(data: DataRecipe, train: Corpus, validation: Corpus | None) -> int:
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
    parts: dict[str, Any] = {
        "format": FORMAT,
        "train": _identity(train),
        "validation": _identity(validation) if validation else data.validation_fraction,
        "tokenizer": sha256(source) if source else data.vocab_size,
        "end_of_text": data.end_of_text,
    }
    if data.text_field != "text":
        parts["text_field"] = data.text_field
    if size := window_size(data, train, validation):
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
