"""``poetx data``: a text tokenized once into a directory of its own, which ``data.train`` then names."""

from __future__ import annotations

import contextlib
import filecmp
from pathlib import Path

from poetx.data.prepare import DataPlan, Progress, build, plan_data, window_size
from poetx.data.tokens import META, TOKENIZER, DataMeta, open_tokens, token_files, verified_meta
from poetx.data.writing import PROGRESS
from poetx.errors import UserError
from poetx.files import is_write_error, locked, unwritten, write_text
from poetx.recipe.sections import DataRecipe

KEY = "text.key"  # of the text and settings that the files in the directory are of
_LOCK = ".lock"
#: What a tokenizer's directory has beside ``tokenizer.json``, for transformers.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def prepare_directory(data: DataRecipe, directory: Path, say: Progress) -> DataMeta:
    """Tokenize ``data`` into ``directory``; one that was stopped, at whatever moment, goes on when it is called again.

    Raises:
        UserError: text that cannot be read, a directory with other things in it or with tokens of other text, or a disk
            that is full.
    """
    plan = plan_data(data, None, {"DIR": directory}, say)
    if data.seq_len != DataRecipe.model_fields["seq_len"].default and not window_size(
        data, plan.train, plan.validation
    ):
        say(f"data.seq_len={data.seq_len}: has no effect on text that is not packed; poetx train cuts it into windows")
    names = {META, TOKENIZER, PROGRESS, KEY, _LOCK, *_SETTINGS, *(f"{name}.bin" for name in token_files(True))}
    names |= {f"{name}.tmp" for name in names}  # half-written when a process was killed
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; name a directory")
    if directory.is_dir() and (other := sorted(p.name for p in directory.iterdir() if p.name not in names)):
        raise UserError(f"{directory}: has {other[0]}, which is no part of prepared data; name a directory of its own")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / _LOCK, busy=f"{directory}: another process prepares data there", keep=False):
            return _prepared(data, directory, say, plan)
    except BaseException as error:
        with contextlib.suppress(OSError):
            directory.rmdir()  # one with nothing in it
        if not is_write_error(error):
            raise
        raise UserError(f"{unwritten(directory, error)}, then run it again") from None


def _prepared(data: DataRecipe, directory: Path, say: Progress, plan: DataPlan) -> DataMeta:
    key = directory / KEY
    started = key.is_file() and key.read_text(encoding="utf-8")
    if started and started != plan.key:
        what = "holds tokens" if (directory / META).is_file() else "an unfinished preparation"
        raise UserError(
            f"{directory}: {what} of other text or settings, or the text's files have been written or moved since; "
            "delete it, or name another directory"
        )
    if not started:
        if any(directory.glob("*.bin")) or (directory / META).exists():
            raise UserError(f"{directory}: holds tokens that poetx data did not write; name another directory")
        write_text(key, plan.key)
    if (directory / META).is_file():
        say("The text is tokenized already")
        meta = verified_meta(directory)
        _copy_settings(plan, directory)  # which a kill may have come before
        return meta
    if (directory / PROGRESS).is_file():
        say("Going on where it was stopped")
    else:
        for file in directory.glob("*.bin"):  # of a process that was killed before it recorded anything
            file.unlink()
    meta = build(plan, data, directory, say, resumable=True)
    _copy_settings(plan, directory)
    (directory / PROGRESS).unlink(missing_ok=True)
    for file in directory.glob("*.tmp"):
        file.unlink()
    return meta


def _copy_settings(plan: DataPlan, directory: Path) -> None:
    """Put what the tokenizer's directory has beside it into ``directory``, each file at once."""
    for name in _SETTINGS if plan.source is not None else ():
        assert plan.source is not None
        own, copy = plan.source.parent / name, directory / name
        if own.is_file() and not (copy.is_file() and filecmp.cmp(own, copy, shallow=False)):
            write_text(copy, own.read_text(encoding="utf-8"))


def samples(directory: Path, meta: DataMeta, *, tokens: int = 60) -> list[tuple[str, str]]:
    """Beginnings of the training text and of the validation text as the tokens say them, with the part's name."""
    from poetx.data.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(directory / TOKENIZER)
    data = open_tokens(directory, meta, seq_len=1)
    found = [("training", 0), ("training", meta.train_tokens // 2), ("validation", 0)]
    rows = {"training": data.train.tokens, "validation": data.validation.tokens}
    return [
        (name, tokenizer.decode(rows[name][start : start + tokens].tolist(), skip_special_tokens=False))
        for name, start in found
    ]
