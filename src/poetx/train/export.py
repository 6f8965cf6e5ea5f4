"""Writing a run's tokenizer and its model as plain Hugging Face directories."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poetx.data.tokenizer import fast_tokenizer
from poetx.distributed.checksum import checksum_of
from poetx.errors import UserError
from poetx.files import new_directory, read_json, sha256
from poetx.plain_model import writable_generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER_DIR = "tokenizer"
TOKENIZER_SUM = "tokenizer_sha256"  # in environment.json
TEXT_SUM = "text_fingerprint"  # there, too
MODEL_SUM = "pretrained_checksum"  # there, too: of the weights that a run began with


def tokenizer_sum(run_dir: Path) -> str | None:
    """The checksum of a run's ``tokenizer.json``; None where it has none, as tokenizers of some classes."""
    file = run_dir / TOKENIZER_DIR / "tokenizer.json"
    return sha256(file) if file.is_file() else None


def recorded(run_dir: Path, key: str) -> Any:
    """A fact of ``environment.json``; None without it: it is for people, and a run of a former version is whole."""
    try:
        return read_json(run_dir / "environment.json").get(key)
    except UserError:
        return None


def check_start(model: PreTrainedModel, pretrained: str, run_dir: Path) -> None:
    """Refuse to measure what became of weights that are not those the run began with."""
    known = recorded(run_dir, MODEL_SUM)
    if known is not None and checksum_of(model) not in (None, known):
        raise UserError(
            f"model.pretrained={pretrained}: has changed since the run began, and spectra are measured against what it "
            "was; bring that back, or go on with train.spectrum_every=null"
        )


def save_tokenizer(
    file: Path, end_of_text: str, source: str | None, directory: Path, *, chat_template: str = ""
) -> None:
    """Write the tokenizer as transformers reads it, with the token that ended the documents in training.

    Args:
        file: its ``tokenizer.json``.
        source: where the user's own tokenizer came from; a directory there is copied with all its other settings.
        chat_template: what conversations were written by in training.

    Raises:
        UserError: the disk is full or not writable.
    """
    from transformers import AutoTokenizer

    if source is not None and Path(source).expanduser().is_dir():
        tokenizer = AutoTokenizer.from_pretrained(Path(source).expanduser(), local_files_only=True)
        if tokenizer.bos_token in (None, tokenizer.eos_token):  # a token of its own for beginnings stays
            tokenizer.bos_token = end_of_text
        tokenizer.eos_token = end_of_text
    else:
        tokenizer = fast_tokenizer(file, end_of_text)
    if chat_template:
        tokenizer.chat_template = chat_template
    with new_directory(directory, remedy="run the command again") as temporary:
        tokenizer.save_pretrained(temporary)


def export_model(
    model: PreTrainedModel, tokenizer_dir: Path, directory: Path, *, shard_size: str | None = None
) -> None:
    """Fold ``model`` to plain linears **in place** and write it with its tokenizer to ``directory``.

    Generation stops at the token that ended the documents in training. The directory is replaced as a whole.

    Args:
        shard_size: of one file, which is in memory once more while it is written; None: what ``transformers`` takes.

    Raises:
        UserError: the disk is full or not writable; nothing half-written is left.
    """
    from transformers import AutoTokenizer

    from poetx.convert import to_dense_

    to_dense_(model)
    model.config.use_cache = True
    stop_at_(model, AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True).eos_token_id)
    model.generation_config = writable_generation(model.generation_config)
    remedy = "write it with poetx export RUN DIR; the run's checkpoints are untouched"
    with new_directory(directory.resolve(), remedy=remedy) as temporary:
        sizes: dict[str, Any] = {} if shard_size is None else {"max_shard_size": shard_size}
        model.save_pretrained(temporary, **sizes)
        shutil.copytree(tokenizer_dir, temporary, dirs_exist_ok=True)  # it may have directories, of chat templates


def stop_at_(model: PreTrainedModel, end_of_text_id: int | None) -> None:
    """Have ``generate()`` stop at the end of text of training; a pretrained model may have ended with another token."""
    for config in (model.config, model.generation_config):
        known = getattr(config, "eos_token_id", None)
        if config is not None and end_of_text_id not in (None, known, *(known if isinstance(known, list) else [])):
            config.eos_token_id = end_of_text_id
