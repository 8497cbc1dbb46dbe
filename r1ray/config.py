"""From a YAML file and `key=value` overrides to one frozen config object.

    config = load_config(FinetuneConfig, "jobs/configs/finetune_lora.yaml", ["train.num_workers=2"])

Precedence: override > file > field default. A value is read as YAML (`null`, `true`, `3`, `2e-5`, `[a, b]`), except that an
exponent without a dot is a number too. An unknown key names its nearest neighbour. This module knows no field of any job.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from r1ray.errors import InvalidValue, UnknownKey

__all__ = ["Config", "config_hash", "described", "dump_yaml", "keys", "load_config", "parse_arguments"]

_OPTIONS = ("--", "--config", "--help", "--keys")  # all others name a setting


class Config(BaseModel):
    """Base of every job's and deployment's config: immutable, keyword only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-5` as text; users mean a number. It also takes the second of two equal keys in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"it has {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The twin of `_Loader`: quotes what that would read as a number."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Unicode's line breaks survive only inside double quotes, where they are escaped."""
    style = '"' if any(mark in value for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Dumper.add_representer(str, _text)


def load_config(schema: type[C], path: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Read `path` (optional), apply `overrides` in order and validate.

    Raises:
        InvalidValue: the file is missing or no mapping, an override is not `key=value`, or a value breaks its field's limits.
        UnknownKey: a key that `schema` has not; the message names the nearest one.
    """
    tree = _read(Path(path)) if path is not None else {}
    for override in overrides:
        _apply(tree, override)
    places = ([] if path is None else [str(path)]) + (["the command line"] if overrides or path is None else [])
    return _validate(schema, tree, origin=" or ".join(places))


def parse_arguments(schema: type[C], description: str | None, argv: Sequence[str] | None = None) -> C:
    """The one command line of all jobs: `--config FILE key=value ...`; an override may be written `--key value` too.

    Overrides may stand before or after the options. Exits as argparse does on a malformed command line, and after `--keys`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the job's settings; defaults where absent")
    parser.add_argument("--keys", action="store_true", help="list every setting with its default and meaning, and end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file; --key value is the same")
    arguments = parser.parse_intermixed_args(list(_as_overrides(sys.argv[1:] if argv is None else argv, parser.error)))
    if arguments.keys:
        print("\n".join(described(schema)))
        raise SystemExit(0)
    return load_config(schema, arguments.config, arguments.overrides)


def _as_overrides(argv: Sequence[str], fail: Callable[[str], NoReturn]) -> Iterator[str]:
    """`--key value` and `--key=value` as `key=value`; all else as it is."""
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in _OPTIONS:
            yield word
            continue
        if not equals:
            value = next(words, "--")
        if value.startswith("--"):
            fail(f"{option} has no value. Write {option} VALUE or {option[2:]}=VALUE, a switch as {option[2:]}=true.")
        yield f"{option[2:]}={value}"


def dump_yaml(config: BaseModel) -> str:
    """The resolved config as YAML, fields in declaration order: what is printed once and stored in the artifact."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def config_hash(config: BaseModel) -> str:
    """Twelve hex digits that change with any value: names the run so that the same job resumes instead of starting over."""
    import hashlib

    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of `schema`, depth first; a union of configs gives the keys of each variant."""
    for name, info in schema.model_fields.items():
        yield prefix + name
        for nested in _nested(info.annotation):
            yield from keys(nested, f"{prefix}{name}.")


def described(schema: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[str]:
    """A line per setting: `key = default  # meaning`; a group of settings has a line without a default before theirs, `key[].`
    begins those of each member of a list or mapping.

    `defaults` are those of a group where its owner gives it others than its class has.
    """
    for name, info in schema.model_fields.items():
        value: Any = getattr(defaults, name) if isinstance(defaults, schema) else info.get_default(call_default_factory=True)
        nested = _nested(info.annotation)
        is_group = bool(nested) and value is not None
        shown = (
            "" if is_group else " = (required)" if info.is_required() else f" = {json.dumps(to_jsonable_python(value), ensure_ascii=False)}"
        )
        yield f"{prefix}{name}{shown}  # {info.description or ''}"
        for group in nested:
            yield from described(group, f"{prefix}{name}.", value if is_group else None)
        for member in _schemas(info.annotation):
            if member not in nested:  # of a list or a mapping
                yield from described(member, f"{prefix}{name}[].")


def _nested(annotation: Any) -> list[type[BaseModel]]:
    """Config classes that a field's annotation allows directly (not inside a mapping or sequence)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = getattr(annotation, "__origin__", None)
    if isinstance(origin, type) and issubclass(origin, Mapping | Sequence | set | frozenset):
        return []
    return [schema for argument in get_args(annotation) for schema in _nested(argument)]


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise InvalidValue(f"No config file at {path}. Give an existing YAML file, e.g. one of jobs/configs/.") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidValue(f"{path} is no readable YAML: {error}. Mend the line it names.") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InvalidValue(f"{path} holds a {type(tree).__name__}, not `key: value` lines. See jobs/configs/ for the form.")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in dotted.split(".")):
        raise InvalidValue(f"Override {override!r} is not of the form key=value. Write e.g. train.learning_rate=2e-5.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InvalidValue(f"The value of override {override!r} is no YAML: {error}. Quote it.") from error
    *parents, leaf = dotted.strip().split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        child = node[parent] = {} if child is None else child
        if not isinstance(child, dict):
            raise InvalidValue(f"Override {override!r}: {parent} is {child!r}, which has no fields. Drop .{leaf}.")
        node = child
    node[leaf] = value


def _validate(schema: type[C], tree: dict[str, Any], origin: str) -> C:
    try:
        return schema.model_validate(_without_empty_sections(schema, tree))
    except ValidationError as error:
        raise _translate(schema, error, origin) from error


def _translate(schema: type[BaseModel], error: ValidationError, origin: str) -> UnknownKey | InvalidValue:
    """One of our errors for pydantic's list: unknown keys first, since a typo often causes the others."""
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    if unknown:
        return UnknownKey(" ".join(_unknown_key(schema, p["loc"], origin) for p in unknown))
    lines = [_line(p) for p in problems]
    return InvalidValue(f"In {origin}: " + " ".join(lines) + " Correct the value; each field's limits are in its config class.")


def _line(problem: ErrorDetails) -> str:
    """A section whose keys do not go together is not repeated: the message names them."""
    given, message = problem["input"], problem["msg"].removeprefix("Value error, ")
    shown = "" if problem["type"] == "value_error" and isinstance(given, dict) else f" (got {given!r})"
    return f"{_dotted(problem['loc'])}: {message}{shown}."


def _without_empty_sections(schema: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """`train:` with every line below it commented out means the defaults, not null, unless the field may be null."""
    kept = {}
    for name, value in tree.items():
        info = schema.model_fields.get(name)
        nested = _nested(info.annotation) if info else []
        if value is None and info and nested and type(None) not in get_args(info.annotation):
            continue
        deeper = isinstance(value, dict) and len(nested) == 1
        kept[name] = _without_empty_sections(nested[0], value) if deeper else value
    return kept


def _unknown_key(schema: type[BaseModel], location: tuple[int | str, ...], origin: str) -> str:
    known = list(dict.fromkeys(_keys_inside(schema)))
    segments = {segment for key in known for segment in key.split(".")}
    # pydantic also names the variant of a union on the way, which is no key
    path = [part for part in location[:-1] if isinstance(part, int) or part in segments]
    parents = [part for part in path if isinstance(part, str)]
    shown, bare, leaf = _dotted((*path, location[-1])), _dotted((*parents, location[-1])), str(location[-1])
    siblings = [key for key in known if key.split(".")[:-1] == parents]
    for candidates, wanted in ((siblings, bare), (known, bare)):
        if near := difflib.get_close_matches(wanted, candidates, n=1, cutoff=0.6):
            break
    else:
        leaves = difflib.get_close_matches(leaf, [key.rsplit(".", 1)[-1] for key in known], n=1)
        near = [key for key in known if key.rsplit(".", 1)[-1] in leaves]
    if near and near[0] in siblings:
        near = [_dotted((*path, near[0].rsplit(".", 1)[-1]))]
    hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(siblings or schema.model_fields)}."
    return f"Unknown key {shown!r} in {origin}. {hint}"


def _keys_inside(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """As `keys`, but also inside lists and mappings of configs, without their indices."""
    for name, info in schema.model_fields.items():
        yield prefix + name
        for nested in _schemas(info.annotation):
            yield from _keys_inside(nested, f"{prefix}{name}.")


def _schemas(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for argument in get_args(annotation) for schema in _schemas(argument)]


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)
