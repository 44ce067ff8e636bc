"""Settings: a dataclass is the schema, a YAML file holds the values, `a.b=c` overrides one of them.

The layers of a value, weakest first: the named YAML file, further files or mappings (`over`), overrides in their order.
pydantic checks the types; the messages are our own, because they must name the key, the value and the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from replan.errors import ConfigError

T = TypeVar("T")
Source = str | Path | Mapping[str, Any]
Override = str | tuple[str, Any]

# The installed wheel carries configs/ inside the package, a checkout has it beside the package.
_ROOTS = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")
_LITERALS = (type(None), bool, int, float, str)


def load(kind: type[T], source: Source, overrides: Sequence[Override] = (), over: Sequence[Source] = ()) -> T:
    """Read a `kind` (a dataclass) from `source`: a name under configs/, a YAML file, or a plain mapping.

    `over` are partial sources laid on top; `overrides` come on top of those in their order, each an `"a.b=c"` string
    (c is a YAML scalar) or an `("a.b", value)` pair.
    Raises ConfigError, which lists every unknown, missing or mistyped key, or names the unreadable file.
    """
    values = _named(kind, read(source))
    for layer in over:
        values = _merge(values, _named(kind, read(layer)))
    for override in overrides:
        key, value = split(override) if isinstance(override, str) else override
        values = _named(kind, _put(values, key, value))
    return _build(kind, values)


def preset(kind: type, spec: str | Path) -> dict[str, Any]:
    """The plain values of a preset of `kind`, a name in its own folder of configs/ or a file. Raises ConfigError."""
    folder = kind.PRESETS  # type: ignore[attr-defined]
    if isinstance(spec, Path) or Path(spec).suffix in (".yaml", ".yml", ".json"):
        return read(Path(spec))
    names = [name.removeprefix(f"{folder}/") for name in config_names() if name.startswith(f"{folder}/")]
    if spec not in names:
        raise ConfigError(f"{folder} = {spec!r}: unknown{nearest(spec, names)}; use {', '.join(names)}, or a YAML file")
    return read(f"{folder}/{spec}")


def _named(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with every section that is given by a preset's name spelled out, the schema's defaults too.

    A preset is whole: nothing of another one below it shines through.
    """
    spelled = dict(values)
    for name, hint in typing.get_type_hints(kind).items():
        given = spelled.get(name)
        if isinstance(given, str) and hasattr(hint, "PRESETS"):
            spelled[name] = dump(_build(hint, preset(hint, given)))
    return spelled


def dump(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists and scalars; `load(type(config), dump(config)) == config`."""
    plain = _plain(config)
    if not isinstance(plain, dict):
        raise TypeError(f"dump takes a dataclass, not {type(config).__name__}")
    return plain


def config_path(name: str) -> Path:
    """The file of a name such as `edit/mini`, in a checkout and in an installed package. Raises ConfigError."""
    stem = name.removesuffix(".yaml")
    for root in _ROOTS:
        path = root / f"{stem}.yaml"
        if path.is_file():
            return path
    known = config_names()
    raise ConfigError(f"no config is called {name!r}{nearest(stem, known)}; there are: {', '.join(known)}")


def config_names() -> list[str]:
    """Every name that config_path knows, sorted."""
    return sorted({p.relative_to(root).with_suffix("").as_posix() for root in _ROOTS for p in root.rglob("*.yaml")})


def split(override: str) -> tuple[str, Any]:
    """`"mask.expand=0.15"` as `("mask.expand", 0.15)`; the value is YAML. Raises ConfigError."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is written key=value, for example steps=20")
    return key, parse_yaml(text, f"the value of {key}")


def nearest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean X?)"` for the closest known word, or an empty string."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6) if "." in word else []
    if not close:  # `expand` for `mask.expand`: the right name at the wrong depth; of equal ones the first
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(word.rpartition(".")[2], leaves, n=1, cutoff=0.6)]
    return f" (did you mean {close[0]}?)" if close else ""


def keys(kind: type) -> list[str]:
    """The dotted names of all settings of a dataclass, nested ones included."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        found.append(name)
        found += [f"{name}.{inner}" for sub in _dataclasses_in(hint) for inner in keys(sub)]
    return found


def parse_yaml(text: str, where: str) -> Any:
    """YAML with plain scalars: `no`, `on`, `012` and dates are strings, `1e-3` is a number; no key may come twice."""
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from error


def _loader() -> type[Any]:
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML speaks YAML 1.1; its implicit types surprise people who write settings."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key_node, _ in node.value:
                if not isinstance(key_node.value, str):
                    raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
                if key_node.value in seen:
                    mark = key_node.start_mark
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key_node.value!r} is written twice", mark
                    )
                seen.add(key_node.value)
            return super().construct_mapping(node, deep=deep)

    Loader.yaml_implicit_resolvers = {}
    number = r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
    for tag, pattern, first in (
        ("null", r"null|Null|NULL|~|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
        ("float", rf"{number}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+0123456789.")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), first)
    return Loader


def read(source: Source) -> dict[str, Any]:
    """The plain values of a source, unchecked. Raises ConfigError when it cannot be read or is no mapping."""
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not (path.suffix in (".yaml", ".yml", ".json") or isinstance(source, Path)):
        path = config_path(str(source))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file (UTF-8)") from error
    values = _parse_json(text, path) if path.suffix == ".json" else parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold keys and values, not a {type(values).__name__}")
    return values


def _parse_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _put(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    *parents, leaf = key.split(".")
    result = dict(values)
    inner = result
    for depth, name in enumerate(parents, 1):
        below = inner.get(name)
        if below is not None and not isinstance(below, Mapping):
            raise ConfigError(f"{key}: {'.'.join(parents[:depth])} is {below!r}, which has no settings of its own")
        inner[name] = inner = dict(below or {})
    inner[leaf] = value
    return result


def _build(kind: type[T], values: Mapping[str, Any]) -> T:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    # A plain dataclass takes pydantic's settings only from a type around it, hence the 1-tuple. JSON mode is the strict
    # one that still reads lists as tuples and 1 as 1.0, but neither "1" as a number nor 1 as true.
    adapter = TypeAdapter(tuple[kind], config=ConfigDict(extra="forbid", strict=True))  # type: ignore[valid-type]
    try:
        return adapter.validate_json(json.dumps([values], default=str))[0]
    except ValidationError as failure:
        lines = [_explain(error, kind) for error in failure.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from failure


def _explain(error: Mapping[str, Any], kind: type) -> str:
    key = ".".join(str(part) for part in error["loc"][1:])
    match error["type"]:
        case "unexpected_keyword_argument":
            return f"{key}: unknown{nearest(key, keys(kind))}"
        case "missing":
            return f"{key}: missing, and it has no default"
        case "value_error":
            return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
        case _:
            expected = error["msg"].removeprefix("Input should be ").removesuffix(" (got Infinity)")
            return f"{key or kind.__name__}: {error['input']!r} should be {expected}"


def _dataclasses_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [found for part in typing.get_args(hint) for found in _dataclasses_in(part)]
    return []


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, _LITERALS):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a setting may not be a {type(value).__name__}")
