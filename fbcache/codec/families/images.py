"""Images of Pillow.

Guarantees
----------
- Pixels, mode, size, palette, ``info`` and ``format`` come back as they were. What else hangs on an image
  stays behind, as with ``Image.copy``: the file it came from, and changes to ``getexif()`` that are not in
  ``info`` yet.
- An image that still has its file (``PngImageFile`` and the like) comes back as a plain ``Image.Image``; the
  pool loads it and keeps a plain one from the beginning. One of several frames is refused.
- A size that does not match the pixels is damage, and found before anything is made of them.

Pillow's memory cannot be had without a copy: ``tobytes`` is one. (Its Arrow interface lends the memory of
images of one block only, of 16 MB by default.) Modes that Pillow keeps as they travel (``L``, ``P``,
``RGBA``, ``RGBX``, ``CMYK``, ``I;16``) come back without one, over the buffer; others are unpacked. Over a
reader's buffer an image is marked as read-only: what draws on it makes a copy first, and what cannot says so.
"""

from __future__ import annotations

from fractions import Fraction
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from PIL import Image
from PIL.ImagePalette import ImagePalette
from PIL.PngImagePlugin import iTXt
from PIL.TiffImagePlugin import IFDRational

from fbcache.codec.families.kinds import Kind, Size
from fbcache.codec.tags import INLINE_BYTES, Node, expect
from fbcache.errors import UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

#: Bits of a pixel as it travels, and bytes as Pillow keeps it.
_MODES: Final = {
    "1": (1, 1),
    **dict.fromkeys(("L", "P"), (8, 1)),
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), (16, 2)),
    **dict.fromkeys(("LA", "La", "PA"), (16, 4)),
    **dict.fromkeys(("RGB", "YCbCr", "LAB", "HSV"), (24, 4)),
    **dict.fromkeys(("RGBA", "RGBa", "RGBX", "CMYK", "I", "F"), (32, 4)),
}
_ROW: Final = 8  # bytes that Pillow takes for a row of an image without columns
_LONGEST: Final = 65_535  # rows or columns of an image without pixels; nobody needs so many
_HEAD: Final = 600  # bytes of an image without pixels; of one with a palette three times that

_PLUGINS: Final = (
    ("Bmp", "BmpImageFile"),
    ("Bmp", "DibImageFile"),
    ("Gif", "GifImageFile"),
    ("Ico", "IcoImageFile"),
    ("Jpeg2K", "Jpeg2KImageFile"),
    ("Jpeg", "JpegImageFile"),
    ("Mpo", "MpoImageFile"),
    ("Png", "PngImageFile"),
    ("Ppm", "PpmImageFile"),
    ("Tga", "TgaImageFile"),
    ("Tiff", "TiffImageFile"),
    ("WebP", "WebPImageFile"),
)


def _encode(encoder: Encoder, image: Image.Image) -> Node:
    if image.mode not in _MODES or (0 in image.size and max(image.size) > _LONGEST):
        return NotImplemented
    try:
        raw = _pixels(image)
    except Exception as error:  # whatever the reader of its format says
        raise encoder.unsupported(f"its pixels cannot be had: {error!r}") from error
    palette = _encode_palette(encoder, image)
    head = [image.mode, list(image.size), encoder.part(".format", image.format)]
    return [*head, palette, encoder.part(".info", image.info), _encode_raw(encoder, raw)]


def _decode(decoder: Decoder, node: Node, depth: int) -> Image.Image:
    mode, size, form, palette, info, source = node
    form = decoder.value(form, depth)
    colours = None if palette is None else _decode_palette(decoder, palette, depth)
    info = expect(decoder.value(info, depth), dict)
    image = _over(decoder, source, expect(mode, str), _size(size))
    if colours is not None:
        _set_palette(image, *colours)
    image.info = info
    if form is not None:
        image.format = form
    return image


def _encode_raw(encoder: Encoder, raw: bytes) -> Node:
    if len(raw) < INLINE_BYTES:
        return raw
    encoder.buffers.append(raw)
    return len(encoder.buffers) - 1


# ------------------------------------------------------------------------------------- pixels


def _pixels(image: Image.Image) -> bytes:
    """The pixels; for an image without any as many bytes as it takes, so that a blob cannot ask for more."""
    width, height = image.size
    return image.tobytes() if width and height else bytes(height * _ROW)


def _expected(mode: str, size: tuple[int, int]) -> int:
    width, height = size
    if not width:
        return height * _ROW
    return (width * _MODES[mode][0] + 7) // 8 * height


def _size(node: Node) -> tuple[int, int]:
    width, height = expect(node, list)
    if min(expect(width, int), expect(height, int)) < 0:
        raise ValueError("an image's size is negative")
    return width, height


def _over(decoder: Decoder, source: Node, mode: str, size: tuple[int, int]) -> Image.Image:
    """An image of these pixels: over the buffer where its mode allows it, else unpacked from it."""
    raw = memoryview(source) if type(source) is bytes else decoder.bulk(source)
    if raw.nbytes != _expected(mode, size):
        raise ValueError("an image's pixels are not as many as its size says")
    if 0 in size:
        if max(size) > _LONGEST:
            raise ValueError("an image without pixels is too long")
        return Image.new(mode, size)
    if type(source) is bytes:
        return Image.frombytes(mode, size, source)
    image = Image.frombuffer(mode, size, raw, "raw", mode, 0, 1)  # type: ignore[arg-type]  # any buffer will do
    if decoder.writable:
        image.readonly = 0  # the memory is this value's own
    return image


# ------------------------------------------------------------------------------------ palettes


def _encode_palette(encoder: Encoder, image: Image.Image) -> Node:
    """A palette twice: as Python has it, and as the pixels do, of which the latter may have more colours."""
    palette = image.palette
    if palette is None or image.mode not in ("P", "PA"):
        return None
    colours = palette.palette
    if type(colours) not in (bytes, bytearray, list, tuple):
        colours = bytes(colours)
    mode = image.im.getpalettemode()
    kept = bytes(image.getpalette(mode) or ())
    return [palette.mode, encoder.part(".palette", colours), mode, kept]


def _decode_palette(decoder: Decoder, node: Node, depth: int) -> tuple[Any, str, bytes]:
    mode, colours, kept_mode, kept = node
    palette = ImagePalette(expect(mode, str))
    palette.palette = decoder.value(colours, depth)
    if type(palette.palette) not in (bytes, bytearray, list, tuple):
        raise TypeError("a palette is no sequence of colours")
    return palette, expect(kept_mode, str), expect(kept, bytes)


def _set_palette(image: Image.Image, palette: Any, kept_mode: str, kept: bytes) -> None:
    image.putpalette(kept, kept_mode)
    image.load()  # hands it on to the pixels
    image.palette = palette


# ------------------------------------------------------------------------ images that have a file


def _encode_file(encoder: Encoder, image: Image.Image) -> Node:
    _check_frames(image)
    return _encode(encoder, image)


def _check_frames(image: Any) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        advice = "take .copy() of the one at hand, or a list of copies of them all (PIL.ImageSequence)"
        what = f"one of the {frames} frames of a {type(image).__name__} would be kept"
        raise UnsupportedTypeError(f"{what}: {advice}")


def _own_file(image: Image.Image) -> Image.Image:
    _check_frames(image)
    return _own(image)


def _own(image: Image.Image) -> Image.Image:
    fresh = image.copy()
    if image.format is not None:
        fresh.format = image.format
    return fresh


def _size_of(image: Image.Image) -> Size:
    width, height = image.size
    head = _HEAD if image.palette is None else 3 * _HEAD
    return head + width * height * _MODES.get(image.mode, (32, 4))[1], [image.info]


# ---------------------------------------------------------------------- values that stand in info


def _encode_rational(encoder: Encoder, value: Any) -> Node:
    parts = value.numerator, value.denominator
    return [encoder.node(part) for part in parts] if _are_numbers(*parts) else NotImplemented


def _decode_rational(decoder: Decoder, node: Node, depth: int) -> Any:
    parts = [decoder.value(part, depth) for part in node]
    if not _are_numbers(*parts):
        raise TypeError("a rational is not made of numbers")
    return IFDRational(*parts)


def _are_numbers(numerator: Any, denominator: Any) -> bool:
    return type(numerator) in (int, float, Fraction) and type(denominator) is int


def _encode_text(encoder: Encoder, value: Any) -> Node:
    parts = str(value), getattr(value, "lang", None), getattr(value, "tkey", None)
    return [encoder.node(part) for part in parts]


def _decode_text(decoder: Decoder, node: Node, depth: int) -> Any:
    text, lang, key = (decoder.value(part, depth) for part in node)
    return iTXt(expect(text, str), lang, key)


# -------------------------------------------------------------------------------------- kinds


def _files() -> list[type]:
    """Classes of images that have a file, of the formats that are common."""
    Image.preinit()
    modules = ((import_module(f"PIL.{name}ImagePlugin"), cls) for name, cls in _PLUGINS)
    return [getattr(module, cls) for module, cls in modules]


_NAME: Final = "PIL.Image"  # of all of them, as that is what they come back as

KINDS: tuple[Kind, ...] = (
    *(Kind(cls, _NAME, _encode_file, _decode, size=_size_of, own=_own_file) for cls in _files()),
    Kind(Image.Image, _NAME, _encode, _decode, size=_size_of, own=_own),
    Kind(IFDRational, "PIL.IFDRational", _encode_rational, _decode_rational, travels="msgpack"),
    Kind(iTXt, "PIL.iTXt", _encode_text, _decode_text, travels="msgpack"),
)
