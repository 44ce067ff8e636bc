"""What may be reused between denoising steps, and when. Pure Python; the presets are configs/speed/*.yaml.

A step is one of three kinds:

    full     every token is queried
    cached   text and noise are queried; keys and values of the reference come from the cache
    region   text and the tokens of the regions are queried; keys and values of all other image tokens come from it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from replan.errors import ConfigError

Cache = Literal["none", "reference", "background"]
Kind = Literal["full", "cached", "region"]


@dataclass(frozen=True, slots=True)
class SpeedConfig:
    """How much of a step is taken from earlier steps. The defaults reuse nothing.

    cache              whose keys and values are reused: nobody's, those of the reference tokens, or those of all image
                       tokens outside the regions; then the background follows the reference's own path from noise
    isolate_reference  reference tokens read only reference tokens; null = where that makes their keys depend on neither
                       noise nor noise level, so that reusing them is exact (Qwen-Image-Edit-2511)
    warmup_steps       first steps that reuse nothing
    refresh_interval   after those, every n-th step reuses nothing; 0 = none does
    final_steps        last steps that reuse nothing
    halo               tokens around a region that are edited with it
    """

    PRESETS: ClassVar[str] = "speed"  # a setting of this type may be the name of a file in that folder

    cache: Cache = "none"
    isolate_reference: bool | None = None
    warmup_steps: int = 1
    refresh_interval: int = 0
    final_steps: int = 0
    halo: int = 0

    def __post_init__(self) -> None:
        if self.cache not in ("none", "reference", "background"):
            raise ConfigError(f"cache = {self.cache!r}: must be none, reference or background")
        if not (self.isolate_reference is None or isinstance(self.isolate_reference, bool)):
            raise ConfigError(f"isolate_reference = {self.isolate_reference!r}: must be true, false or null")
        for name, least in (("warmup_steps", 1), ("refresh_interval", 0), ("final_steps", 0), ("halo", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} = {value!r}: must be a whole number, {least} or more")


EXACT = SpeedConfig()


def load_speed(spec: str | Path) -> SpeedConfig:
    """A preset by its name (exact, cached, fast) or a YAML file. Raises ConfigError."""
    from replan import config

    return config.load(SpeedConfig, speed_values(spec))


def speed_values(spec: str | Path) -> dict[str, object]:
    """The plain settings of a preset or a file, as they are written there. Raises ConfigError."""
    from replan import config

    return config.preset(SpeedConfig, spec)


def plan_steps(speed: SpeedConfig, total: int, *, exact_reference: bool = False) -> tuple[Kind, ...]:
    """The kind of each of `total` steps.

    `exact_reference` says that the reference's keys and values depend on neither noise, noise level nor prompt: they
    are then computed in the first step only, and what would be a full step later is a cached one.
    """
    return tuple(_kind(speed, step, total, exact_reference) for step in range(total))


def _kind(speed: SpeedConfig, step: int, total: int, exact_reference: bool) -> Kind:
    if speed.cache == "none" or step == 0:
        return "full"
    after = step - speed.warmup_steps + 1
    fresh = after <= 0 or step >= total - speed.final_steps
    fresh = fresh or (speed.refresh_interval > 0 and after % speed.refresh_interval == 0)
    if not fresh and speed.cache == "background":
        return "region"
    return "cached" if exact_reference or not fresh else "full"
