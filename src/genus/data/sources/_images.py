"""Decoding one picture that nobody vouches for, and bringing it to the size and colours of a data set."""

from __future__ import annotations

import struct
import warnings
import zlib
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field

from genus.config import Section

FORMATS = {  # decoders that may run, and the file names they answer for; others (EPS, PDF …) are no pictures here
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MAX_PIXELS = 64_000_000  # decoded: 256 MB in the worst colour mode
MAX_BYTES = 64_000_000  # of a file

Image.MAX_IMAGE_PIXELS = None  # Unusable says it before decoding, and in one line
# What Pillow's decoders raise on damaged files, besides what is said before decoding.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class Unusable(Exception):
    """A picture that cannot be used; the message is the reason."""


class Look(Section):
    """What every picture is brought to. ``size``: pixels a side; ``mode``: grey (L) or RGB."""

    size: int = Field(gt=0, le=1024)
    mode: Literal["L", "RGB"] = "RGB"
    # centre: the shorter side fits, the rest is cut off; stretch: both sides fit; none: only that size is accepted
    crop: Literal["centre", "stretch", "none"] = "centre"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3 if self.mode == "RGB" else 1, self.size, self.size)


def decode(file: BinaryIO, look: Look) -> np.ndarray:
    """A picture file as uint8 [C, H, W]; the first frame where it has several. Raises Unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            with Image.open(file, formats=tuple(FORMATS)) as image:
                if image.width * image.height > MAX_PIXELS:  # read from the header, nothing is decoded yet
                    raise Unusable(f"{image.width:,}×{image.height:,} pixels, more than {MAX_PIXELS:,} in all")
                return fit(image, look)
    except Image.UnidentifiedImageError as error:
        raise Unusable("not a picture, or its header is damaged") from error
    except _DAMAGE as error:
        raise Unusable(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def fit(image: Image.Image, look: Look) -> np.ndarray:
    """A picture brought to a look: uint8 [C, H, W]. Raises Unusable where its size is wrong and crop is none.

    Turned upright as its EXIF says; what is transparent becomes white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(look.mode)
    size = (look.size, look.size)
    if look.crop == "none" and image.size != size:
        raise Unusable(f"{image.width}×{image.height} pixels where {look.size}×{look.size} is asked for")
    if image.size != size:
        if look.crop == "centre":
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        else:
            image = image.resize(size, Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.uint8)
    return pixels.transpose(2, 0, 1) if look.mode == "RGB" else pixels[None]
