"""Region-aware pixel measures of a run that has plans: what moved outside the boxes, and how much inside them.

torchmetrics computes PSNR, SSIM and LPIPS. Boxes are the plan's own, not widened. Pixels are 0 .. 255.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replan import plan, record
from replan.errors import ConfigError, PlanError, ReplanError
from replan.eval.data import Item
from replan.eval.generate import PICTURE, read_done, read_json
from replan.images import load_image
from replan.types import Box, Plan, Size

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
PIXELS = "pixels.json"
COLUMNS = ("outside_psnr", "outside_ssim", "outside_lpips", "outside_shift", "inside_change")
EQUAL_PSNR = 100.0  # dB, for pictures that are equal there

Row = dict[str, float | list[float] | None]
Plans = Callable[[Item], Plan | None]


def own_plans(folder: Path) -> Plans:
    """The plans of a run; a run of the stock editor has none."""

    def find(item: Item) -> Plan | None:
        done = read_done(folder, item.id)
        found = done.get("plan") if done else None
        return plan.from_json(found, Size(*item.image().size)) if found else None

    return find


def answer_plans(item: Item) -> Plan | None:
    """The plan in the row's own answer; None where the answer is none."""
    try:
        return plan.parse(item.answer, Size(*item.image().size), ())
    except PlanError:
        return None


def measure_run(folder: Path, items: Sequence[Item], plans: Plans) -> Iterator[str | None]:
    """Measure every finished item that has boxes and write pixels.json; yields per item why it has none, or None.

    What was measured before is taken over when picture and boxes are the same.
    """
    path = folder / PIXELS
    past = read_json(path)
    known = past.get("items", {}) if past.get("format") == FORMAT else {}
    library = _version()
    lpips, note = _lpips()
    found: dict[str, Any] = {}
    for item in items:
        try:
            row = _item_row(folder, item, plans(item), known.get(str(item.id), {}), lpips)
        except ReplanError as error:
            row = str(error)
        if isinstance(row, dict):
            found[str(item.id)] = row
        yield row if isinstance(row, str) else None
    record.write_json({"format": FORMAT, "library": library, "notes": [note] if note else [], "items": found}, path)


def measure(source: Image, result: Image, boxes: Sequence[Box], lpips: Any = None) -> Row:
    """The measures of one edit; None for a measure that there are no pixels for.

    outside_shift is the length of the mean colour difference (result - source), given in full as outside_colour;
    inside_change is the mean absolute difference.
    """
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    if source.size != result.size:
        raise ConfigError(f"result of {result.size} pixels, source of {source.size}: must be the same size")
    before, after = _pixels(source), _pixels(result)  # [3, H, W]
    inside = torch.zeros(before.shape[1:], dtype=torch.bool)
    for box in (box.clip(Size(*source.size)) for box in boxes):
        inside[box.top : box.bottom, box.left : box.right] = True
    outside = ~inside
    row: Row = dict.fromkeys((*COLUMNS, "outside_colour"))
    if inside.any():
        row["inside_change"] = float((after - before)[:, inside].abs().mean())
    if not outside.any():
        return row
    psnr = peak_signal_noise_ratio(after[:, outside], before[:, outside], data_range=255.0)
    row["outside_psnr"] = min(float(psnr), EQUAL_PSNR)
    if min(source.size) >= 11:  # the Gaussian window
        _, per_pixel = structural_similarity_index_measure(
            after[None], before[None], data_range=255.0, return_full_image=True
        )
        row["outside_ssim"] = float(per_pixel[0][:, outside].mean())
    colour = (after - before)[:, outside].mean(1)
    row["outside_colour"] = [round(float(part), 4) for part in colour]
    row["outside_shift"] = float(colour.norm())
    if lpips is not None:
        kept = torch.where(inside, before, after)  # the edit itself does not count
        row["outside_lpips"] = float(lpips(kept[None] / 255, before[None] / 255))
    return row


def _item_row(
    folder: Path, item: Item, found: Plan | None, past: Mapping[str, Any], lpips: Any
) -> dict[str, Any] | str:
    if read_done(folder, item.id) is None:
        return "not generated"
    if found is None or not found.regions:
        return "no boxes"
    picture = folder / str(item.id) / PICTURE
    boxes = [list(region.box.as_tuple()) for region in found.regions]
    mark = {"sha256": record.sha256(picture), "boxes": boxes, "lpips": lpips is not None}
    if all(past.get(name) == value for name, value in mark.items()):
        return dict(past)
    source = item.image()
    return mark | measure(source, load_image(picture), [region.box for region in found.regions], lpips)


def _pixels(image: Image) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32).copy()).permute(2, 0, 1)


def _lpips() -> tuple[Any, str | None]:
    """LPIPS with AlexNet, or None and the reason. torchvision downloads AlexNet's weights when it is first used."""
    if importlib.util.find_spec("torchvision") is None:
        return None, (
            "LPIPS skipped: it needs torchvision (pip install torchvision), which downloads AlexNet's weights (244 MB)"
        )
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True), None
    except OSError as error:  # urllib's errors are of this kind
        return None, f"LPIPS skipped: AlexNet's weights (244 MB) could not be downloaded: {error}"
    except (RuntimeError, ImportError) as error:  # built for another torch, or a download that was cut
        return None, f"LPIPS skipped: torchvision or AlexNet's weights are of no use: {error}"


def _version() -> str:
    try:
        return f"torchmetrics {metadata.version('torchmetrics')}"
    except metadata.PackageNotFoundError as error:
        raise ConfigError("pixel measures need torchmetrics: pip install 'replan[eval]' (or --no-pixels)") from error


def read_notes(folder: Path) -> tuple[str, ...]:
    """What was skipped when a run was measured."""
    return tuple(read_json(folder / PIXELS).get("notes", ()))
