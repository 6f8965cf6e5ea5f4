"""Which documents are held out for validation."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from poetx.data.sources import SECTION, Corpus
from poetx.errors import UserError

_FEW_SECTIONS = 40  # of a file too short for sections of the usual size


@dataclass(frozen=True)
class Split:
    """Which documents are held out for validation: evenly spread, exactly ``fraction`` of them in the end.

    Attributes:
        section: characters of a document where a single file is cut into them.
        note: what the user should know of it.
    """

    fraction: float | Fraction = 0
    section: int = SECTION
    note: str = ""

    def held_out(self, index: int) -> bool:
        """Whether document ``index`` belongs to validation."""
        return int((index + 1) * self.fraction) > int(index * self.fraction)


def split_for(corpus: Corpus, fraction: float) -> Split:
    """The split of ``fraction``. Of so little text that this holds out nothing: a tenth, and at least one document.

    Reads to the first document that is held out.

    Raises:
        UserError: no text, or one document that is not a file by itself.
    """
    split, count, characters = Split(fraction), 0, 0
    for index, document in enumerate(corpus.documents()):
        if split.held_out(index):
            return split
        count, characters = count + 1, characters + sum(map(len, document))
    if count == 0:
        raise UserError(f"data.train={corpus.source}: no text to train on")
    if all(part.kind == "file" for part in corpus.parts):
        section = max(1, characters // _FEW_SECTIONS)
        more: float | Fraction = max(fraction, 0.1)
        what = f"{more:.0%} of it, in sections of {section} characters"
    elif count > 1:
        section, more = SECTION, Fraction(1, min(10, count))
        what = f"{int(count * more)} of its {count} documents"
    else:
        raise UserError(
            f"data.validation_fraction={fraction} holds out nothing: data.train={corpus.source} is one document; "
            "give the text file itself, which is held out in sections, more documents, or data.validation=PATH"
        )
    note = f"data.validation_fraction={fraction} is nothing of so little text: holding out {what}"
    return Split(more, section, note)
