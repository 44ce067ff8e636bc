"""Makes assets/figure.png: source with its plan, the edit, and the same editor without regions."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from replan import Editor, EditRequest
from replan.draw import draw_plan
from replan.images import save_image
from replan.mini.scenes import Scene, Thing, draw

ASSETS = Path(__file__).parent.parent / "assets"
SIDE, GAP, TITLE = 384, 12, 34
INSTRUCTION = "replace the left red cup with a plant and make the apple green"
SCENES = {
    "desk.png": Scene(
        "desk",
        0.2,
        (
            Thing("lamp", "yellow", 1, 0, 27),
            Thing("cup", "red", 0, 1, 26),
            Thing("ball", "green", 1, 1, 23),
            Thing("cup", "red", 2, 1, 26),
            Thing("book", "blue", 0, 2, 26),
            Thing("apple", "red", 2, 2, 24),
        ),
    ),
    "shelf.png": Scene(
        "shelf",
        0.8,
        (
            Thing("bottle", "purple", 0, 0, 26),
            Thing("plant", "orange", 1, 0, 27),
            Thing("book", "blue", 2, 0, 26),
            Thing("book", "blue", 0, 1, 24),
            Thing("cup", "white", 2, 1, 25),
            Thing("box", "green", 1, 2, 26),
            Thing("ball", "yellow", 2, 2, 25),
        ),
    ),
    "garden.png": Scene(
        "garden",
        0.1,
        (
            Thing("ball", "red", 0, 1, 26),
            Thing("ball", "red", 2, 1, 22),
            Thing("plant", "purple", 1, 1, 27),
            Thing("apple", "green", 0, 2, 24),
            Thing("box", "orange", 2, 2, 26),
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--planner", default="mini")
    parser.add_argument("--output", type=Path, default=ASSETS / "figure.png")
    arguments = parser.parse_args()
    for name, scene in SCENES.items():
        save_image(draw(scene), ASSETS / name)
    source = draw(SCENES["desk.png"])
    editor = Editor.load(arguments.backbone, arguments.planner)
    edit = editor(EditRequest(source, INSTRUCTION))
    baseline = editor.baseline(EditRequest(source, INSTRUCTION))
    assert edit.plan is not None
    planned = draw_plan(source, edit.plan)  # a square picture with a legend below it
    panels = {
        "source and plan": planned.crop((0, 0, planned.width, planned.width)),
        "replan": edit.image,
        "the same editor, bare instruction": baseline.image,
    }
    figure = Image.new("RGB", (3 * SIDE + 4 * GAP, SIDE + 2 * TITLE + 2 * GAP), "white")
    pen, font = ImageDraw.Draw(figure), ImageFont.load_default(18)
    pen.text((GAP, GAP), f'"{INSTRUCTION}"', "#111111", ImageFont.load_default(20))
    for place, (title, picture) in enumerate(panels.items()):
        left = GAP + place * (SIDE + GAP)
        pen.text((left, GAP + TITLE), title, "#555555", font)
        figure.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, GAP + 2 * TITLE))
    save_image(figure, arguments.output)


if __name__ == "__main__":
    main()
