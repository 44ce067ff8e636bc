"""Qwen-Image-Edit-Plus (2509 and 2511): several pictures; the request's own comes first and is the one edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from replan.backbones.base import EditConfig
from replan.backbones.qwen_image_edit import Pictures, QwenImageEdit, fitted, frame

__all__ = ["QwenImageEditPlus", "frame"]

if TYPE_CHECKING:
    from PIL.Image import Image


class QwenImageEditPlus(QwenImageEdit):
    """Sequence as Qwen-Image-Edit's, with one reference per picture; boxes apply to the first.

    The text encoder sees smaller pictures than the VAE, and the size of the output is that of the edited picture.
    """

    stock = "QwenImageEditPlusPipeline"

    def _pictures(self, image: Image, extra: Sequence[Image], config: EditConfig) -> Pictures:
        """Each picture at two sizes: the stock area for the text encoder, `max_area` for the VAE."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

        processor, pictures = self.pipe.image_processor, [image, *extra]
        sizes = tuple(fitted(picture, config.max_area) for picture in pictures)
        seen = []
        for picture in pictures:
            width, height = fitted(picture, stock.CONDITION_IMAGE_SIZE)
            seen.append(processor.resize(picture, height, width))
        pixels = [
            processor.preprocess(picture, size.height, size.width).unsqueeze(2)
            for picture, size in zip(pictures, sizes, strict=True)
        ]
        return Pictures(seen, pixels, sizes[0], sizes)

    def _picture_prompt(self, pictures: Pictures) -> str:
        """The stock pipeline numbers the pictures in the user's turn."""
        numbers = range(1, len(pictures.refs) + 1)
        return "".join(f"Picture {number}: <|vision_start|><|image_pad|><|vision_end|>" for number in numbers)
