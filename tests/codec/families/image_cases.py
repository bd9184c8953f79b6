"""Images of all modes, and what counts as the same."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo, iTXt
from PIL.TiffImagePlugin import IFDRational

MODES = (
    *("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"),
    *("I;16", "I;16L", "I;16B", "LA", "PA", "La", "RGBa", "RGBX"),
)
OVER_BUFFERS = ("L", "P", "RGBA", "RGBX", "CMYK", "I;16", "I;16L", "I;16B")
FILES = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO")


def noise(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    image = Image.new(mode, size)
    if 0 not in size:
        image.frombytes(np.random.default_rng(seed).bytes(len(image.tobytes())))
    return image


def cases() -> dict[str, Image.Image]:
    sizes = (5, 7), (0, 3), (3, 0), (0, 0)
    found = {f"{mode}, {size}": noise(mode, size) for mode in MODES for size in sizes}
    found |= {f"large {mode}": noise(mode, (301, 201)) for mode in MODES}
    return found | palettes() | infos()


def palettes() -> dict[str, Image.Image]:
    names = "grey", "coloured", "transparent", "alpha", "list", "one"
    found = {name: noise("P", (90, 80)) for name in names}
    colours = np.random.default_rng(1).bytes(768)
    found["coloured"].putpalette(colours)
    found["transparent"].putpalette(colours)
    found["transparent"].info["transparency"] = 3
    found["alpha"].putpalette(colours[:400], "RGBA")
    found["list"].putpalette(list(colours))
    found["one"].putpixel((0, 0), (1, 2, 3))
    found["adaptive"] = noise("RGB", (90, 80)).convert("P", palette=Image.Palette.ADAPTIVE, colors=17)
    found["quantized"] = noise("RGBA", (90, 80)).quantize(9)
    found["alpha beside"] = noise("PA", (90, 80))
    found["alpha beside"].putpalette(colours[:99], "RGB")
    found["never set"] = Image.new("P", (4, 4))
    return found


def infos() -> dict[str, Image.Image]:
    found = {"info": noise("RGB", (5, 5)), "format": noise("L", (5, 5))}
    found["info"].info = {
        "dpi": (IFDRational(72, 1), IFDRational(300, 7)),
        "none": IFDRational(0, 0),
        "half": IFDRational(0.5),
        "comment": b"\xff" * 10,
        ("a", "key"): [1, 2],
        "Title": iTXt("text", "de", "titel"),
    }
    found["format"].format = "JPEG"
    return found


def file(kind: str) -> bytes:
    image = noise("RGB", (40, 30))
    held = io.BytesIO()
    options: dict[str, Any] = {"dpi": (72, 72)} if kind in ("PNG", "JPEG", "TIFF") else {}
    if kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("Title", "text", "de", "titel")
    image.save(held, kind, **options)
    return held.getvalue()


def looks(image: Image.Image) -> list[Any]:
    palette = image.palette
    colours: list[Any] = [image.getpalette(None)]
    if palette is not None:
        own = palette.palette
        colours += [palette.mode, own, type(own), palette.colors, image.im.getpalettemode()]
    info = [(key, type(part), shown(part), getattr(part, "lang", None)) for key, part in image.info.items()]
    return [image.mode, image.size, image.format, info, colours, image.tobytes()]


def shown(part: Any) -> Any:
    """Something that a NaN within does not make unequal to itself."""
    return repr(part) if isinstance(part, (tuple, IFDRational)) else part


def same(left: Image.Image, right: Image.Image) -> bool:
    """The same in all that is kept; what has a file is the same as a plain image."""
    return type(right) is Image.Image and looks(left) == looks(right)
