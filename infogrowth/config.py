"""Configuration: one frozen dataclass per command, filled from YAML and flags, checked first.

Every field is an :func:`option`; its help text is the flag's help. Unknown keys are refused with
the nearest valid name, values are coerced to the field's type (a safe YAML loader reads ``3e-4`` as
a string) and refused when they do not fit.
"""

import argparse
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from infogrowth.errors import UserError, refusing

C = TypeVar("C")


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    min: float | None = None,
    max: float | None = None,
    short: str | None = None,
    positional: bool = False,
    extensions: str = "",
    excludes: str = "",
    needs: str = "",
) -> Any:
    """A configuration field.

    Args:
        default: the value when neither file nor flag gives one; without it the key is required.
        help: one line for ``--help``.
        min, max: the smallest and the largest that a number, or each of several, may be.
        short: a one-letter flag beside the long one, for example ``"-o"``.
        positional: the command line takes it by its position, without a flag.
        extensions: what the name of a file may end in, for example ``".html .png"``.
        excludes: the options that are refused beside it, separated by spaces.
        needs: the option without which it is refused.
    """
    shown: dict[str, Any] = {"help": help, "short": short, "positional": positional}
    rules = {"min": min, "max": max, "extensions": extensions, "excludes": excludes, "needs": needs}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=shown | rules)
    return dataclasses.field(default=default, metadata=shown | rules)


def load_config(
    cls: type[C], path: str | os.PathLike[str] | None = None, flags: Mapping[str, Any] | None = None
) -> C:
    """Build ``cls`` from a YAML file and parsed flags; a flag wins over the file. Raises UserError:
    no such file, not YAML, an unknown key (with the nearest valid name), a value of the wrong type,
    options that do not go together, or a required key that nobody gave.

    Args:
        flags: by name, ``vars()`` of what a parser with :func:`add_flags` returned; names that are
            no options of ``cls`` are passed over.
    """
    given = {key: (value, f"key {key!r} in {path}") for key, value in read_yaml(path).items()}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if (value := (flags or {}).get(field.name, [])) != []:
            given[field.name] = value, _on_command_line(field)
    return build_config(cls, given)


def build_config(cls: type[C], given: dict[str, tuple[Any, str]], of: str = "") -> C:
    """Build ``cls`` from values, each with the words by which an error calls its origin; ``of``
    begins those about values that are missing or do not go together. Raises UserError: as
    :func:`load_config`."""
    fields: dict[str, Any] = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, (given_value, where) in given.items():
        if key not in fields:
            raise UserError(f"unknown {where}{nearest(str(key), list(fields))}")
        knows_auto = "auto" in fields[key].metadata.get("help", "")
        values[key] = _coerce(given_value, hints[key], where, knows_auto)
        _check_value(values[key], fields[key].metadata, where)
    for name, field in fields.items():
        missing = dataclasses.MISSING
        if name not in values and field.default is missing and field.default_factory is missing:
            how = _on_command_line(field)
            if field.metadata.get("positional"):
                all_of_them = [n for n, f in fields.items() if f.metadata.get("positional")]
                how += f" by its position ({' '.join(all_of_them).upper()})"
            raise UserError(f"{of}{name} is missing: give {how}, or a key `{name}:` in the file")
    chosen = {
        name: _on_command_line(fields[name])
        for name, value in values.items()
        if value != fields[name].default and value != []
    }
    for name, flag in chosen.items():
        about = fields[name].metadata
        for other in about.get("excludes", "").split():
            if other in chosen:
                raise UserError(f"{of}give either {flag} or {chosen[other]}, not both")
        if (needed := about.get("needs")) and needed not in chosen:
            raise UserError(f"{of}{flag} goes with {_on_command_line(fields[needed])}")
    return cls(**values)


def _check_value(value: Any, about: Mapping[str, Any], where: str) -> None:
    """Refuse a number out of bounds, and a file of another kind."""
    low, high, endings = (about.get(name) for name in ("min", "max", "extensions"))
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int | float):
            if low is not None and not item >= low:  # NaN is refused too
                raise UserError(f"{where} must be at least {low}, not {item}")
            if high is not None and not item <= high:
                raise UserError(f"{where} must be at most {high}, not {item}")
        elif item and endings and not item.lower().endswith(tuple(endings.split())):
            raise UserError(f"{where} {item} must end in {endings.replace(' ', ' or ')}")


def add_flags(parser: argparse.ArgumentParser, cls: type) -> argparse.ArgumentParser:
    """Give ``parser`` a flag per field of ``cls``, ``--config`` and ``--quiet``; values are checked
    later."""
    parser.add_argument("--config", metavar="FILE.yaml", help="read options from a YAML file")
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        many = typing.get_origin(hint) is list
        common: dict[str, Any] = {"help": _help(field, hint), "default": argparse.SUPPRESS}
        if field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="*" if many else "?", **common)
            continue
        common["dest"] = field.name
        # BLIP's own scripts spell flags with underscores (--output_dir): both forms work.
        names = list(dict.fromkeys([_on_command_line(field), f"--{field.name}"]))
        if field.metadata["short"]:
            names.insert(0, field.metadata["short"])
        if hint is bool:
            common["action"] = argparse.BooleanOptionalAction
        else:
            common["metavar"] = field.name.upper().rsplit("_", 1)[-1]
            common["nargs"] = "+" if many else None
        parser.add_argument(*names, **common)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, warnings only")
    return parser


def read_yaml(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The keys of a YAML file, none for no file. Raises UserError: no such file, not YAML, a key
    given twice, or no mapping."""
    if path is None:
        return {}
    errors = (yaml.YAMLError, UnicodeDecodeError)
    with refusing(path, "the config file", *errors, fault="is not valid YAML"):
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"the config file {path} must hold `key: value` lines")
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, except that a key given twice is an error, not a silent last-one-wins.

    A value that the safe loader cannot convert (a date of month 13) is a YAMLError here, with its
    line.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r:.60} is no {kind}", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            fault = None
            if not isinstance(key, Hashable):
                fault = "a key must be a single value"
            elif key in seen:
                fault = f"key {key!r} is given twice"
            if fault:
                raise yaml.constructor.ConstructorError(None, None, fault, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _coerce(value: Any, hint: Any, where: str, knows_auto: bool = False) -> Any:
    """``value`` as ``hint``, or a UserError that names what would have fitted. An optional number
    whose help speaks of "auto" takes that for None."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    alternatives = typing.get_args(hint) if is_union else (hint,)
    optional = type(None) in alternatives
    knows_auto = knows_auto and optional and str not in alternatives
    if (optional and value in (None, "none", "null")) or (knows_auto and value == "auto"):
        return None
    if is_union and value is None:
        raise UserError(f"{where} has no value")
    wanted = []
    for kind in sorted(alternatives, key=lambda a: a is str):  # "0.4" is a number for float | str
        arguments = typing.get_args(kind)
        if typing.get_origin(kind) is list:
            items = value if isinstance(value, list) else [value]
            return [_coerce(item, arguments[0], where) for item in items]
        if typing.get_origin(kind) is Literal:
            if value in arguments:
                return value
            close = nearest(str(value), [str(a) for a in arguments])
            wanted.append(f"one of {', '.join(map(str, arguments))}{close}")
        elif kind in _SCALARS:
            try:
                return _scalar(kind, value)
            except (KeyError, TypeError, ValueError, OverflowError):
                wanted.append(f"{_SCALARS[kind]}, not {value!r}")
    raise UserError(f"{where} must be {'auto or ' if knows_auto else ''}{' or '.join(wanted)}")


_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _scalar(kind: type, value: Any) -> Any:
    """``value`` as one of _SCALARS, or any of the errors of Python's own conversions."""
    if kind is bool:
        return {"true": True, "yes": True, "false": False, "no": False}[str(value).lower()]
    single = isinstance(value, str | int | float | os.PathLike) and not isinstance(value, bool)
    if not single:
        raise TypeError(value)
    if kind is str:
        return str(value)
    number = float(value)
    if kind is float:
        return number
    if not number.is_integer():  # infinities and NaN are no integers either
        raise ValueError(value)
    return int(value) if isinstance(value, int) else int(number)


def nearest(name: str, valid: list[str]) -> str:
    """The end of an error about an unknown name: the nearest valid one, or all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(valid))}"


def _on_command_line(field: dataclasses.Field) -> str:
    """What an option is called there."""
    if field.metadata.get("positional"):
        return field.name.upper()
    return f"--{field.name.replace('_', '-')}"


def _help(field: dataclasses.Field, hint: Any) -> str:
    text = field.metadata["help"].replace("%", "%%")
    if typing.get_origin(hint) is Literal:
        text += f" ({', '.join(typing.get_args(hint))})"
    if field.default not in (dataclasses.MISSING, None) and hint is not bool:
        text += f" [{field.default}]".replace("%", "%%")
    return text
