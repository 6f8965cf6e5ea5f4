"""YAML as people mean it: a key twice or without a value is an error, ``1:30`` is no number, and ``010`` is ten."""

from __future__ import annotations

from typing import Any

import yaml

from poetx.errors import one_line


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for at, key in enumerate(written) if key in written[:at]]:
            raise ValueError(f"{twice[0]} is there twice; leave one of them out")
        for key, value in node.value:
            if isinstance(value, yaml.ScalarNode) and value.style is None:
                check_given(str(key.value), value.value)
        return super().construct_mapping(node, deep)

    def number(self, node: Any) -> Any:
        text = str(self.construct_scalar(node))
        if ":" in text:
            return text
        if node.tag.endswith("float"):
            return self.construct_yaml_float(node)
        return int(text) if text.lstrip("+-").isdecimal() else self.construct_yaml_int(node)


def check_given(key: str, text: str) -> None:
    """Refuse an empty value, of a variable that is not set or lines commented out, and Python's None; both mean null
    to some. Raises ValueError.
    """
    if text.strip() in ("", "None"):
        raise ValueError(f"{key} has {'no value' if not text.strip() else 'the value None'}; write null to mean none")


def _mapping(loader: _Loader, node: Any) -> Any:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.number)


def read_yaml(text: str) -> Any:
    """The value that YAML ``text`` stands for.

    Raises:
        ValueError: no valid YAML, a key twice in one mapping, no such date, a number of thousands of digits.
        RecursionError: nested too deeply.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None
