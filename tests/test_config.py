"""Settings: layers, types, messages, round trip."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from replan import config
from replan.backbones import EditConfig
from replan.config import dump, keys, load, split
from replan.errors import ConfigError
from replan.speed import load_speed


@dataclass(frozen=True, slots=True)
class Inner:
    expand: float
    mutual: bool = True
    pooled: Literal["main", "hints"] = "main"
    rules: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        if self.expand < 0:
            raise ConfigError(f"expand = {self.expand}: must be at least 0")


@dataclass(frozen=True, slots=True)
class Outer:
    steps: int
    mask: Inner
    true_cfg: float | None
    negative: str = " "
    more: Inner | None = None
    names: Mapping[str, int] = field(default_factory=dict)


GOOD = {"steps": 4, "mask": {"expand": 1, "rules": [[1, "a"], [2, "b"]]}, "true_cfg": None}


def test_types_become_what_the_dataclass_says() -> None:
    made = load(Outer, GOOD)
    assert made == Outer(4, Inner(1.0, rules=((1, "a"), (2, "b"))), None)
    assert isinstance(made, Outer)
    assert isinstance(made.mask.expand, float)


@pytest.mark.parametrize(
    "extra", [{}, {"more": {"expand": 0.5, "pooled": "hints"}, "names": {"a": 1}, "true_cfg": 4.0}]
)
def test_dump_loads_back_equal(extra: dict) -> None:
    made = load(Outer, {**GOOD, **extra})
    assert load(Outer, dump(made)) == made


def test_layers_file_then_over_then_overrides(tmp_path: Path) -> None:
    base, partial = tmp_path / "base.yaml", tmp_path / "partial.yaml"
    base.write_text("steps: 4\ntrue_cfg: null\nmask:\n  expand: 0.1\n  mutual: false\n")
    partial.write_text("steps: 5\nmask: {expand: 0.2}\n")
    assert load(Outer, base).steps == 4
    assert load(Outer, str(base), over=[partial]).mask == Inner(0.2, mutual=False)
    made = load(Outer, base, ["steps=6", "mask.expand=1e-3", ("negative", "true")], over=[partial])
    assert (made.steps, made.mask.expand, made.negative) == (6, 1e-3, "true")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a=1", 1), ("a=1.5", 1.5), ("a=1e-3", 0.001), ("a=.5", 0.5), ("a=true", True), ("a=no", "no"),
        ("a=", None), ("a=null", None), ("a=[1, 2]", [1, 2]), ("a='1'", "1"), ("a=2024-01-01", "2024-01-01"),
        ("a=x=y", "x=y"), ("a=012", "012"), ("a=none", "none"), ("a= ", None), ("a=.inf", math.inf),
        ("a=1:30", "1:30"), ("a=off", "off"),
    ],
)  # fmt: skip
def test_overrides_are_yaml_scalars(override: str, value: object) -> None:
    assert split(override) == ("a", value)
    assert type(split(override)[1]) is type(value)


def test_an_override_reaches_into_an_absent_group() -> None:
    assert load(Outer, GOOD, ["more.expand=2"]).more == Inner(2.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mask.expnd=1"], "mask.expnd: unknown (did you mean mask.expand?)"),
        (["expand=1"], "expand: unknown (did you mean mask.expand?)"),
        (["step=1"], "step: unknown (did you mean steps?)"),
        (["zzzzz=1"], "zzzzz: unknown"),
        (["more.mutual=true"], "more.expand: missing, and it has no default"),
        (["steps=many"], "steps: 'many' should be a valid integer"),
        (["steps=2.5"], "steps: 2.5 should be a valid integer"),
        (["steps=true"], "steps: True should be a valid integer"),
        (["mask.expand='1'"], "mask.expand: '1' should be a valid number"),
        (["mask.pooled=both"], "mask.pooled: 'both' should be 'main' or 'hints'"),
        (["mask.expand=-1"], "mask: expand = -1.0: must be at least 0"),
        (["mask=3"], "mask: 3 should be an object"),
        (["mask.rules=[[1, 2]]"], "mask.rules.0.1: 2 should be a valid string"),
        (["true_cfg.a=1", "steps.a=1"], "steps.a: steps is 4, which has no settings of its own"),
        (["steps"], "'steps': an override is written key=value, for example steps=20"),
        (["=1"], "'=1': an override is written key=value, for example steps=20"),
        (["a=[1"], "the value of a line 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_every_mistake_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Outer, GOOD, overrides)
    assert str(caught.value) == message


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load(Outer, {"step": 1, "mask": {"expand": "x"}, "true_cfg": 1.0})
    assert str(caught.value).splitlines() == [
        "steps: missing, and it has no default",
        "mask.expand: 'x' should be a valid number",
        "step: unknown (did you mean steps?)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"steps: [1", "line 1: not valid YAML"),
        (b"- 1\n- 2\n", "must hold keys and values, not a list"),
        (b"steps: 1\nsteps: 2\n", "line 2: not valid YAML: key 'steps' is written twice"),
        (b"\xff\xfe\x00", "is not a text file"),
        (b"", "steps: missing"),
    ],
)
def test_bad_files(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r".*") as caught:
        load(Outer, path)
    assert message in str(caught.value)


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(GOOD))
    assert load(Outer, path) == load(Outer, GOOD)
    path.write_text('{"steps": 1')
    with pytest.raises(ConfigError, match=r"run\.json: not valid JSON: Expecting"):
        load(Outer, path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read: No such file"):
        load(Outer, tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(Outer, tmp_path)


def test_names_in_a_checkout_and_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, checkout = tmp_path / "package", tmp_path / "checkout"
    for root, text in ((installed, "steps: 1"), (checkout, "steps: 2")):
        (root / "edit").mkdir(parents=True)
        (root / "edit" / "mini.yaml").write_text(text)
    monkeypatch.setattr(config, "_ROOTS", (installed, checkout))
    assert config.config_path("edit/mini") == installed / "edit" / "mini.yaml"
    monkeypatch.setattr(config, "_ROOTS", (tmp_path / "absent", checkout))
    assert config.config_path("edit/mini.yaml") == checkout / "edit" / "mini.yaml"
    with pytest.raises(ConfigError, match=r"is called 'edit/mni' \(did you mean edit/mini\?\); there are: edit/mini"):
        config.config_path("edit/mni")


def test_keys_are_dotted() -> None:
    assert {"steps", "mask", "mask.expand", "more.rules"} <= set(keys(Outer))


def test_a_preset_is_whole(tmp_path: Path) -> None:
    """Nothing of a preset below shines through one that names fewer values."""
    below = tmp_path / "own.yaml"
    below.write_text("speed: cached\n")
    for name in ("exact", "fast"):
        chosen = load(EditConfig, "edit/mini", [("speed", name)], over=[below])
        assert chosen.speed == load(EditConfig, "edit/mini", over=[{"speed": name}]).speed == load_speed(name)


@pytest.mark.parametrize("text", ["steps: {{ steps }}", "? [1, 2]\n: 3"])
def test_a_key_is_a_word(text: str) -> None:
    with pytest.raises(ConfigError, match="a key must be a word"):
        config.parse_yaml(text, "x.yaml")
