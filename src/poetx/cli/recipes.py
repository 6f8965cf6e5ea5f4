"""``poetx recipes``: what there is to train by, and the names of recipes and keys in the help of ``poetx train``."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from poetx.errors import UserError, nearest

_WIDTH = 100


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Examples: poetx recipes | poetx recipes demo > mine.yaml")(recipes)


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Print this one's YAML.")] = None,
) -> None:
    """Show the built-in recipes and methods, or the YAML of one recipe, to begin your own with."""
    from poetx.recipe import builtin_recipes
    from poetx.recipe.places import recipe_path
    from poetx.recipe.shorthands import METHODS, SIZED_RECIPES

    if name is None:
        for title in builtin_recipes():
            if title not in SIZED_RECIPES:
                print(f"{title:24}{_first_line(title)}")
        print(f"{'llama in one word':24}{', '.join(SIZED_RECIPES)}")
        print(f"{'method=':24}{', '.join(METHODS)}")
        return
    if name not in builtin_recipes():
        raise UserError(f"{name}: no built-in recipe{nearest(name, builtin_recipes())}; poetx recipes names them")
    text = recipe_path(name).read_text(encoding="utf-8")
    text = re.sub("(?m)^name: .*\n", "", text)  # a copy has its own file's name, and so runs of its own
    if name in SIZED_RECIPES:
        text = re.sub("(?m)^  shape: .*", f"  shape: {SIZED_RECIPES[name]}", text)
    print(text, end="")


def _first_line(name: str) -> str:
    from poetx.recipe.places import recipe_path

    return recipe_path(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def complete_recipe(incomplete: str) -> list[str]:
    """Names of recipes, for a shell; paths the shell knows by itself."""
    from poetx.recipe import builtin_recipes

    return [name for name in builtin_recipes() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """``section.key=`` and the words of ``method=``, for a shell."""
    from poetx.recipe.sections import every_key
    from poetx.recipe.shorthands import METHODS

    keys = [f"{section}.{key}=" for section, names in every_key().items() for key in names]
    return [text for text in (*keys, *(f"method={name}" for name in METHODS)) if text.startswith(incomplete)]


def say_idle(overrides: Sequence[str]) -> None:
    """Tell of settings that are a whole run's, to commands about one step of it."""
    from poetx.recipe.resuming import idle_in_a_step

    if keys := idle_in_a_step(overrides):
        print(f"note: no effect on one step: {', '.join(keys)}", file=sys.stderr)


class CommandWithSettings(TyperCommand):
    """A command that takes settings, KEY=VALUE, which some write as options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line. Raises :class:`UserError` on an option that is not there."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ != "NoSuchOption":  # click's, of which some versions of typer have their own copy
                raise
            name, alike = (getattr(error, key) for key in ("option_name", "possibilities"))
            raise UserError(
                f"{name}: no such option{nearest(name, alike or ())}; settings of the recipe are KEY=VALUE "
                "(data.seq_len=512)"
            ) from None


class CommandOfRecipes(CommandWithSettings):
    """A command whose help ends with the names of all recipes, methods and keys, looked up when it is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, and the names after it."""
        from poetx.recipe import builtin_recipes
        from poetx.recipe.sections import every_key
        from poetx.recipe.shorthands import METHODS

        super().format_help(ctx, formatter)
        named = {"recipes": list(builtin_recipes()), "method=": list(METHODS)}
        named |= {f"{section}.": names for section, names in every_key().items()}
        for title, words in named.items():
            print(textwrap.fill(f"{title:12}{', '.join(words)}", _WIDTH, subsequent_indent=" " * 12))
        print("\npoetx recipes RECIPE shows one; docs/training.md says what keys mean.")
