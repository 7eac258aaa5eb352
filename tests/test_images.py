"""Image sources -> arrays: formats, shapes, values, limits."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from carso.bundle import InputSpec
from carso.errors import (
    AnimatedImage,
    BlankImage,
    EmptyBatch,
    NotFinite,
    NotNumbers,
    ObjectArray,
    OutOfRange,
    RaggedArray,
    RequestError,
    TooManyImages,
    TooManyPixels,
    TransparentImage,
    UndecodableImage,
    UndecodableNpy,
    UnsupportedDtype,
    WrongScale,
    WrongShape,
)
from carso.images import png
from carso.images.npy import parse as parse_npy
from carso.images.reader import Reader
from carso.options import ImageOptions
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from tests.pictures import encoded, npy, saved

GREY = Reader(InputSpec(shape=(1, 6, 5)), max_images=4, max_pixels=1000)
COLOUR = Reader(InputSpec(shape=(3, 6, 5), low=-1, high=1), max_images=4, max_pixels=1000)


def shows_something(pixels: np.ndarray) -> bool:
    return bool(np.ptp(pixels.astype(int), axis=(0, 1)).max() > 2)


grey_pixels = arrays.arrays(np.uint8, (6, 5)).filter(shows_something)
colour_pixels = arrays.arrays(np.uint8, (6, 5, 3)).filter(
    lambda pixels: shows_something(np.dstack([pixels, (pixels @ [0.299, 0.587, 0.114]).round()])[..., 3:])
)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
LOSSLESS = ({"kind": "PNG"}, {"kind": "BMP"}, {"kind": "WEBP", "lossless": True, "exact": True})
KINDS = (*LOSSLESS, {"kind": "JPEG"})


def one(reader: Reader, source: object, **options: object) -> np.ndarray:
    batch = reader.read([source], ImageOptions(**options))
    assert batch.dtype == np.float32
    assert batch.shape == (1, *reader.spec.shape)
    return batch[0]


@given(grey_pixels, st.sampled_from(LOSSLESS))
def test_a_lossless_grey_image_is_its_pixels_over_255(pixels, options):
    if options["kind"] == "WEBP":  # which has no grey
        pixels = np.stack([pixels] * 3, axis=2)
    image = one(GREY, encoded(pixels, **options))
    grey = pixels if pixels.ndim == 2 else pixels[..., 0]
    np.testing.assert_array_equal(image[0], grey.astype(np.float32) / np.float32(255))


@given(colour_pixels, st.sampled_from(LOSSLESS))
def test_a_lossless_colour_image_is_scaled_to_the_range_of_the_bundle(pixels, options):
    image = one(COLOUR, encoded(pixels, **options))
    np.testing.assert_allclose(image, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert image.min() >= -1 and image.max() <= 1


@given(colour_pixels)
def test_colour_becomes_grey_by_the_luma_of_itu_r_601(pixels):
    luma = pixels @ [0.299, 0.587, 0.114] / 255
    np.testing.assert_allclose(one(GREY, encoded(pixels))[0], luma, atol=0.6 / 255)


@given(grey_pixels)
def test_grey_fills_all_channels_of_a_colour_bundle(pixels):
    image = one(COLOUR, encoded(pixels))
    np.testing.assert_allclose(image, np.stack([pixels / 127.5 - 1] * 3), atol=1e-6)


@given(arrays.arrays(np.uint16, (6, 5)).filter(lambda pixels: pixels.max() >= 2**14 and np.ptp(pixels) > 257))
def test_a_16_bit_grey_image_keeps_its_precision(pixels):
    np.testing.assert_allclose(one(GREY, encoded(pixels))[0], pixels / 65535, atol=1e-7)
    np.testing.assert_allclose(one(COLOUR, encoded(pixels))[2], pixels / 32767.5 - 1, atol=1e-6)


def test_a_1_bit_image_is_black_and_white():
    bits = np.arange(30).reshape(6, 5) % 2 == 0
    np.testing.assert_array_equal(one(GREY, saved(Image.fromarray(bits)))[0], bits)


def test_a_palette_image_shows_its_colours():
    pixels = np.arange(90, dtype=np.uint8).reshape(6, 5, 3)
    image = one(COLOUR, saved(Image.fromarray(pixels).quantize(64)))
    np.testing.assert_allclose(image, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=0.05)


def test_a_jpeg_is_read_in_grey_colour_and_cmyk():
    pixels = np.full((6, 5, 3), 200, np.uint8)
    pixels[:, 3:] = 90
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0]), Image.fromarray(pixels).convert("CMYK")):
        np.testing.assert_allclose(one(GREY, saved(image, "JPEG", quality=98))[0], pixels[..., 0] / 255, atol=0.03)


@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_the_exif_orientation_is_applied(orientation, turned):
    upright = np.arange(30, dtype=np.uint8).reshape(6, 5) * 8
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.rot90(upright, -turned).copy()
    np.testing.assert_array_equal(one(GREY, encoded(stored, exif=exif))[0], upright / np.float32(255))


@given(colour_pixels, st.sampled_from(["PNG", "WEBP"]))
def test_an_alpha_channel_without_transparency_changes_nothing(pixels, kind):
    opaque = np.dstack([pixels, np.full((6, 5), 255, np.uint8)])
    options = {"lossless": True} if kind == "WEBP" else {}
    expected = one(GREY, encoded(pixels, kind, **options))
    np.testing.assert_array_equal(one(GREY, encoded(opaque, kind, **options)), expected)


def two_values(mode: str) -> Image.Image:
    """One pixel is 200 (2: of a palette of 16), all others are 7 (1)."""
    low, high = {"P": (1, 2), "I;16": (7 * 257, 200 * 257)}.get(mode, (7, 200))
    image = Image.new(mode, (5, 6), low)
    image.putpixel((0, 0), high)
    if mode == "P":
        image.putpalette([0, 0, 0, 7, 7, 7, 200, 200, 200])
    return image


TRANSPARENT = {"P": 1, "L": 7, "I;16": 7 * 257}


@pytest.mark.parametrize("mode", ["RGBA", "LA", *TRANSPARENT])
def test_a_transparent_pixel_is_refused_unless_a_background_is_named(mode):
    if mode == "RGBA":
        pixels = np.full((6, 5, 4), 255, np.uint8)
        pixels[..., :3] = NOISE[:6, :5, None]
        pixels[2, 3, 3] = 253
        data = encoded(pixels)
    elif mode == "LA":
        data = encoded(np.dstack([NOISE[:6, :5], NOISE[6:12, :5]]))
    else:
        data = saved(two_values(mode), transparency=TRANSPARENT[mode])
    with pytest.raises(TransparentImage, match="background=white"):
        one(GREY, data)
    if mode in TRANSPARENT:
        for background, level in (("white", 255), ("black", 0), ("808080", 128)):
            seen = one(GREY, data, background=background)[0]
            assert seen[0, 0] == np.float32(200 / 255)
            np.testing.assert_allclose(seen.ravel()[1:], level / 255, atol=1e-6)
    if mode == "LA":
        alpha = NOISE[6:12, :5] / 255
        expected = NOISE[:6, :5] / 255 * alpha + (1 - alpha)
        np.testing.assert_allclose(one(GREY, data, background="white")[0], expected, atol=2 / 255)


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_a_transparent_colour_that_no_pixel_has_changes_nothing(mode):
    data = saved(two_values(mode), transparency=0)
    np.testing.assert_allclose(one(GREY, data)[0, 0, :2], [200 / 255, 7 / 255], atol=1e-6)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_pixel_that_is_opaque_but_for_one_level_is_opaque(kind):
    pixels = np.dstack([NOISE[:6, :5]] * 3 + [np.full((6, 5), 255, np.uint8)])
    pixels[2, 3, 3] = 254
    data = encoded(pixels, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(one(GREY, data)[0], NOISE[:6, :5] / np.float32(255))


def bitmap(alpha: np.ndarray) -> bytes:
    """A 32-bit bitmap with the header of version 5, as Windows' clipboard has it."""
    pixels = np.dstack([NOISE[:6, :5]] * 3 + [alpha])[::-1]
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 124, 5, 6, 1, 32, 3, pixels.size, 2835, 2835, 0, 0) + masks
    head = head.ljust(124, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + 124 + pixels.size, 0, 0, 14 + 124) + head + pixels.tobytes()


def test_a_bitmap_whose_alpha_is_nowhere_used_is_opaque():
    expected = NOISE[:6, :5] / np.float32(255)
    for alpha in (0, 255):
        np.testing.assert_array_equal(one(GREY, bitmap(np.full((6, 5), alpha, np.uint8)))[0], expected)
    with pytest.raises(TransparentImage):
        one(GREY, bitmap(NOISE[6:12, :5]))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animated_image_is_refused(kind):
    frames = [Image.new("RGB", (5, 6), colour) for colour in ("red", "green", "blue")]
    with pytest.raises(AnimatedImage, match="3 frames"):
        one(GREY, saved(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_a_photo_with_previews_is_its_first_frame():
    frames = [Image.fromarray(pixels) for pixels in (NOISE[:6, :5], NOISE[6:12, :5])]
    photo = saved(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=98)
    np.testing.assert_allclose(one(GREY, photo)[0], NOISE[:6, :5] / 255, atol=0.05)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(kind):
    with pytest.raises(UndecodableImage, match="PNG, JPEG, WebP or BMP"):
        one(GREY, saved(Image.new("L", (5, 6)), kind))


@given(colour_pixels, st.sampled_from(KINDS), st.integers(1, 1000))
def test_a_truncated_image_is_refused_wherever_it_is_cut_unless_all_its_pixels_are_there(pixels, options, missing):
    data = encoded(pixels, **options)
    try:
        whole = one(COLOUR, data)
    except (BlankImage, WrongScale):  # JPEG keeps no small differences
        assume(False)
    try:
        image = one(COLOUR, data[: max(len(data) - missing, 0)])
    except UndecodableImage:
        return
    np.testing.assert_array_equal(image, whole)
    assert missing <= 22  # of PNG: a chunk of 12 bytes, two checksums of 4, and the end of the packed data


@pytest.mark.parametrize(("kind", "end"), [("PNG", 12), ("JPEG", 2)])
def test_a_missing_end_marker_is_no_matter(kind, end):
    data = encoded(NOISE[:6, :5], kind)
    np.testing.assert_array_equal(one(GREY, data[:-end]), one(GREY, data))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_jpeg_that_lacks_pixels_is_refused_though_it_has_an_end(progressive, share):
    data = encoded(NOISE, "JPEG", progressive=progressive)
    start = data.index(b"\xff\xda")
    with pytest.raises(UndecodableImage, match="Corrupt JPEG data"):
        one(GREY, data[: start + int(share * (len(data) - start))] + b"\xff\xd9", resize=True)
    with pytest.raises(UndecodableImage):
        one(GREY, data[: start + int(share * (len(data) - start))], resize=True)


def test_a_jpeg_that_is_damaged_in_its_middle_is_refused():
    data = bytearray(encoded(NOISE, "JPEG"))
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    data[middle : middle + 20] = b"\xff\xd5" * 10
    with pytest.raises(UndecodableImage, match="Corrupt JPEG data"):
        one(GREY, bytes(data), resize=True)


def png_of(
    *chunks: tuple[bytes, bytes], rows: bytes | None = None, damaged: bytes = b"", cut: int = 0, more: bytes = b""
) -> bytes:
    """NOISE[:6, :5] as PNG with these chunks besides. `damaged`: the chunk whose checksum is wrong. The packed pixels
    are without their last `cut` bytes, and with `more` behind them.
    """
    packed = zlib.compress(b"".join(b"\0" + bytes(row) for row in NOISE[:6, :5]) if rows is None else rows)
    packed = packed[: len(packed) - cut] + more
    header = struct.pack(">IIBBBBB", 5, 6, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), *chunks, (b"IDAT", packed), (b"IEND", b"")):
        checksum = zlib.crc32(kind + content) ^ (kind == damaged)
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return data


@pytest.mark.parametrize("rows", [b"", b"\0" + bytes(5), (b"\0" + bytes(range(5))) * 5, (b"\0" + bytes(range(5))) * 6])
def test_a_png_whose_packed_pixels_end_too_early_is_refused(rows):
    data = png_of(rows=rows)
    if len(rows) == 36:
        one(GREY, data)
    else:
        with pytest.raises(UndecodableImage, match="lacks"):
            one(GREY, data)


@pytest.mark.parametrize("cut", range(5))  # the last four are a checksum
def test_a_png_that_lacks_no_packed_pixel_is_whole(cut):
    np.testing.assert_array_equal(one(GREY, png_of(cut=cut))[0], NOISE[:6, :5] / np.float32(255))
    np.testing.assert_array_equal(one(GREY, png_of(more=bytes(cut)))[0], NOISE[:6, :5] / np.float32(255))


def test_a_png_whose_rows_are_packed_in_an_unknown_way_is_refused():
    with pytest.raises(UndecodableImage, match="damaged"):
        one(GREY, png_of(rows=(b"\7" + bytes(range(5))) * 6))


MEGABYTES = zlib.compress(bytes(2**22))
FAULTS = {
    "a huge profile": (b"iCCP", b"icc\0\0" + MEGABYTES),
    "a huge text": (b"zTXt", b"Comment\0\0" + MEGABYTES),
    "broken Exif": (b"eXIf", b"garbage!"),
    "broken text": (b"iTXt", b"\xff"),
    "a palette too many": (b"sPLT", b""),
}


@pytest.mark.parametrize("chunk", FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_beside_the_pixels_of_a_png_is_no_matter(chunk):
    expected = NOISE[:6, :5] / np.float32(255)
    np.testing.assert_array_equal(one(GREY, png_of(chunk))[0], expected)
    np.testing.assert_array_equal(one(GREY, png_of(chunk, damaged=chunk[0]))[0], expected)


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT"])
def test_a_png_whose_pixels_fail_their_checksum_is_refused(kind):
    with pytest.raises(UndecodableImage, match=kind.decode()):
        one(GREY, png_of(damaged=kind))


def test_a_png_with_two_headers_is_refused():
    with pytest.raises(UndecodableImage, match="two chunks IHDR"):
        one(GREY, png_of((b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0))))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_broken_exif_data_is_no_matter(kind):
    image = Image.fromarray(NOISE[:6, :5])
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        np.testing.assert_array_equal(one(GREY, saved(image, kind, exif=exif)), one(GREY, saved(image, kind)))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (13, 9)])
def test_every_pass_of_an_interlaced_png_is_counted(size, interlaced):
    """Of 8 bits grey: a row of each pass takes a byte and its pixels."""
    width, height = size
    passes = png._PASSES if interlaced else ((0, 0, 1, 1),)
    parts = [(len(range(x, width, dx)), len(range(y, height, dy))) for x, y, dx, dy in passes]
    due = sum(rows * (1 + columns) for columns, rows in parts if columns)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)
    assert png._header([(b"IHDR", header)]) == (size, 8, due, None if interlaced else "L")


@pytest.mark.parametrize("compression", [{}, {"bits": 8}])
def test_bitmaps_of_every_kind_are_read(compression):
    for mode in ("1", "L", "P", "RGB"):
        image = Image.fromarray(NOISE[:6, :5]).convert(mode)
        np.testing.assert_array_equal(one(GREY, saved(image, "BMP")), one(GREY, saved(image, "PNG")))


# values that are none of an image


@pytest.mark.parametrize("value", [0, 1, 77, 255])
def test_a_blank_image_is_refused_by_name(value):
    pixels = np.full((6, 5), value, np.uint8)
    for source in (encoded(pixels), encoded(pixels, "BMP"), pixels, (pixels / 255).tolist()):
        with pytest.raises(BlankImage, match="every pixel has the same value"):
            one(GREY, source)
    with pytest.raises(BlankImage):  # of one colour, which is another value in each channel
        one(COLOUR, encoded(np.full((6, 5, 3), (200, 10, value), np.uint8)))
    with pytest.raises(BlankImage, match="entry 1 of the array"):
        GREY.read([np.stack([NOISE[:6, :5], pixels])])


BITS = (NOISE[:6, :5] > 128).astype(np.uint8)


@pytest.mark.parametrize(
    "source",
    [
        BITS,
        BITS.astype(np.int64),
        encoded(BITS),
        encoded(BITS, "BMP"),
        encoded(np.dstack([BITS] * 3)),
        BITS[None, None],
    ],
    ids=["uint8", "int64", "PNG", "BMP", "RGB", "batch"],
)
def test_8_bit_values_of_0_and_1_are_refused_as_not_scaled(source):
    with pytest.raises(WrongScale, match="the maximum of a uint8 image is 1, so it is not scaled"):
        one(GREY, source)
    np.testing.assert_array_equal(one(GREY, BITS.astype(bool))[0], BITS)
    np.testing.assert_array_equal(one(GREY, BITS.astype(float))[0], BITS)
    np.testing.assert_array_equal(one(GREY, BITS.astype(bool).tolist())[0], BITS)
    np.testing.assert_array_equal(one(GREY, BITS.tolist())[0], BITS)


def test_values_that_were_scaled_twice_are_refused():
    twice = NOISE[:6, :5] / 255 / 255
    for source in (twice, twice.astype(np.float32), twice.tolist()):
        with pytest.raises(WrongScale, match="scaled twice"):
            one(GREY, source)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_in_16_are_refused_and_never_a_dark_image(bits):
    values = np.round(NOISE[:6, :5] / 255 * (2**bits - 1)).astype(np.uint16)
    values[0, 0] = 2**bits - 1
    in_colour = struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    colour = png_of(rows=rows).replace(png_of()[16:33], in_colour + zlib.crc32(b"IHDR" + in_colour).to_bytes(4))
    for source in (encoded(values), values, *([colour] if bits > 8 else [])):  # all 8 bits are lost, and it is blank
        with pytest.raises(WrongScale, match="16-bit"):
            one(GREY, source)


@given(grey_pixels)
def test_inverting_turns_every_value_round(pixels):
    np.testing.assert_allclose(one(GREY, encoded(pixels), invert=True), 1 - one(GREY, encoded(pixels)), atol=1e-6)
    np.testing.assert_allclose(one(COLOUR, encoded(pixels), invert=True), -one(COLOUR, encoded(pixels)), atol=1e-6)
    np.testing.assert_allclose(one(GREY, pixels, invert=True), 1 - one(GREY, pixels), atol=1e-6)


@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_whatsoever_get_another_answer_than_an_image_or_a_refusal(data, resize):
    for prefix in (
        b"",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"\xff\xd8\xff",
        b"RIFF\xff\x00\x00\x00WEBPVP8 ",
        b"BM",
    ):
        with suppress(RequestError):
            one(GREY, prefix + data, resize=resize)


@given(
    colour_pixels, st.sampled_from(KINDS), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8)
)
def test_a_damaged_image_is_read_or_refused(pixels, options, damage):
    data = bytearray(encoded(pixels, **options))
    for position, value in damage:
        data[position % len(data)] = value
    try:
        image = one(COLOUR, bytes(data))
    except RequestError:
        return
    assert image.min() >= -1 and image.max() <= 1


@given(st.integers(1, 12), st.integers(1, 12))
def test_an_encoded_image_of_another_shape_is_refused_with_both_shapes(height, width):
    data = encoded(NOISE[:height, :width])
    if (height, width) == (6, 5):
        one(GREY, data)
    else:
        with pytest.raises(WrongShape) as refusal:
            one(GREY, data)
        assert f"[1, {height}, {width}]" in str(refusal.value)
        assert "[1, 6, 5]" in str(refusal.value)
        assert "resize=true" in str(refusal.value)


@given(st.integers(2, 25), st.integers(2, 25), st.booleans())
def test_resizing_keeps_the_proportions_and_pads_with_the_background(height, width, invert):
    reader = Reader(InputSpec(shape=(3, 6, 5), low=-1, high=1, background=-0.5), max_images=1, max_pixels=1000)
    image = one(reader, encoded(NOISE[:height, :width] // 2 + 100), resize=True, invert=invert)
    assert image.min() >= -1 and image.max() <= 1
    scale = min(6 / height, 5 / width)
    rows, columns = (max(1, round(scale * side)) for side in (height, width))
    padding = image == -0.5
    assert padding.all(axis=(0, 2)).sum() == 6 - rows
    assert padding.all(axis=(0, 1)).sum() == 5 - columns
    assert not padding.all(axis=0)[2:4, 2].all()  # it is in the middle


@given(st.integers(2, 25), st.integers(2, 25))
def test_stretching_fills_the_image(height, width):
    image = one(GREY, encoded(NOISE[:height, :width] // 2 + 100), resize=True, fit="stretch")
    assert image.min() >= 99 / 255


def test_resizing_skips_no_pixel():
    checkers = (np.indices((30, 25)).sum(axis=0) % 2 * 255).astype(np.uint8)
    np.testing.assert_allclose(one(GREY, encoded(checkers), resize=True), 0.5, atol=0.05)


def test_a_large_jpeg_is_resized_as_a_png_of_the_same_pixels_is():
    pixels = np.asarray(Image.fromarray(NOISE[:6, :6]).resize((480, 480), Image.Resampling.BICUBIC))
    reader = Reader(InputSpec(shape=(1, 6, 5)), max_images=1, max_pixels=480 * 480)
    from_jpeg, from_png = (one(reader, encoded(pixels, kind), resize=True) for kind in ("JPEG", "PNG"))
    np.testing.assert_allclose(from_jpeg, from_png, atol=0.05)


@pytest.mark.parametrize("side", [32, 10_000, 30_000])
def test_more_pixels_than_the_cap_are_refused_before_decoding(side):
    header = encoded(np.zeros((1, 1), np.uint8))
    chunk = b"IHDR" + side.to_bytes(4) * 2 + header[24:29]
    bomb = header[:12] + chunk + zlib.crc32(chunk).to_bytes(4) + header[33:]
    with pytest.raises(TooManyPixels, match="pixels"):
        one(GREY, bomb, resize=True)


def test_the_cap_on_pixels_is_on_all_images_of_a_request_together():
    fits = encoded(NOISE[:20, :25])
    resize = ImageOptions(resize=True)
    assert len(GREY.read([fits, fits], resize)) == 2
    with pytest.raises(TooManyPixels, match="image 2"):
        GREY.read([fits, fits, fits], resize)


def test_several_sources_make_one_batch_in_their_order():
    one_, other = NOISE[:6, :5], NOISE[6:12, :5]
    batch = GREY.read([encoded(one_), (other / 255).tolist(), encoded(one_, "BMP")])
    np.testing.assert_allclose(batch[:, 0], np.stack([one_, other, one_]) / 255, atol=1e-6)


@given(arrays.arrays(np.float64, (6, 5), elements=st.floats(0, 1)))
def test_nested_numbers_are_taken_as_they_are(values):
    assume(np.ptp(values) > 0.01)
    expected = values.astype(np.float32)
    np.testing.assert_array_equal(one(GREY, values.tolist())[0], expected)
    np.testing.assert_array_equal(one(GREY, [values.tolist()])[0], expected)
    np.testing.assert_array_equal(one(COLOUR, [values.tolist()] * 3), [expected] * 3)


@pytest.mark.parametrize("shape", [(5, 6), (6, 6), (30,), (2, 6, 5), (3, 6, 5), (1, 1, 6, 5), (6, 5, 1), (1, 30)])
def test_nested_numbers_of_another_shape_are_refused(shape):
    for resize in (False, True):
        with pytest.raises(WrongShape, match=r"takes \[6, 5\], \[1, 6, 5\]: "):
            one(GREY, np.zeros(shape).tolist(), resize=resize)


@pytest.mark.parametrize(
    ("source", "refusal"),
    [
        ([[0.5] * 5] * 5 + [[0.5] * 4], RaggedArray),
        ([[0.5] * 5] * 5 + [0.5], RaggedArray),
        ([[0.5] * 5] * 5 + [[0.5] * 4 + [None]], NotNumbers),
        ([[0.5] * 5] * 5 + [[0.5] * 4 + ["0.5"]], NotNumbers),
        ([[True] * 5] * 6, BlankImage),
        ([[10**30] * 5] * 6, NotNumbers),
        ([[{}] * 5] * 6, NotNumbers),
        ({"pixels": []}, NotNumbers),
        (None, NotNumbers),
        (0.5, NotNumbers),
        ([], EmptyBatch),
        ([[]] * 6, EmptyBatch),
        ([[0.5] * 5] * 5 + [[0.5] * 4 + [float("nan")]], NotFinite),
        ([[0.5] * 5] * 5 + [[0.5] * 4 + [float("inf")]], NotFinite),
        ([[-float("inf")] * 5] * 6, NotFinite),
        ([[0.5] * 5] * 5 + [[0.5] * 4 + [1.0001]], OutOfRange),
        ([[255] * 5] * 6, OutOfRange),
        ([[-1] * 5] * 6, OutOfRange),
    ],
)
def test_what_is_no_image_is_refused_by_name(source, refusal):
    with pytest.raises(refusal):
        one(GREY, source)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=40,
)


@given(json_values, st.booleans())
def test_any_json_value_is_read_or_refused(value, resize):
    for reader in (GREY, COLOUR):
        try:
            image = one(reader, value, resize=resize)
        except RequestError:
            continue
        assert reader.spec.low <= image.min() and image.max() <= reader.spec.high


@pytest.mark.parametrize(
    ("reader", "shape", "images"),
    [
        (GREY, (6, 5), 1),
        (GREY, (1, 6, 5), 1),
        (GREY, (3, 6, 5), 3),
        (GREY, (3, 1, 6, 5), 3),
        (COLOUR, (3, 6, 5), 1),
        (COLOUR, (4, 3, 6, 5), 4),
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "<f2", ">f4", "<f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npy_file_of_any_allowed_shape_type_and_order_is_read(reader, shape, images, dtype, order):
    spec = reader.spec
    levels = np.random.default_rng(0).integers(0, 256, shape)
    values = levels if dtype == "u1" else spec.low + (spec.high - spec.low) * levels / 255
    batch = reader.read([parse_npy(npy(np.asarray(values, dtype, order=order)))])
    expected = (spec.low + (spec.high - spec.low) * levels / 255).reshape(images, *spec.shape)
    np.testing.assert_allclose(batch, expected, atol=1e-3 if "2" in dtype else 1e-6)


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize(
    ("reader", "shape", "mend"),
    [
        (GREY, (6, 5, 1), "channels last; transpose it to channels first (array.transpose(2, 0, 1))"),
        (GREY, (6, 5, 3), "(array.transpose(2, 0, 1)), and make its 3 channels 1"),
        (GREY, (12, 10, 1), "channels last"),
        (GREY, (60, 50, 3), "channels last"),
        (GREY, (7, 9, 4), "channels last"),
        (GREY, (1, 6, 5, 1), "(array.transpose(0, 3, 1, 2))"),
        (GREY, (3, 12, 10, 3), "channels last"),
        (COLOUR, (6, 5, 3), "channels last; transpose it to channels first (array.transpose(2, 0, 1))"),
        (COLOUR, (2, 6, 5, 3), "(array.transpose(0, 3, 1, 2))"),
        (COLOUR, (6, 5, 1), "and make its 1 channels 3"),
        (GREY, (6, 5, 10), "a batch whose images are the last axis"),
        (GREY, (30,), "flattened; reshape it (array.reshape(-1, 1, 6, 5))"),
        (GREY, (1, 30), "flattened"),
        (GREY, (10, 30), "flattened"),
        (GREY, (30, 1), "flattened"),
        (GREY, (1, 1, 30), "flattened"),
        (COLOUR, (2, 90), "flattened; reshape it (array.reshape(-1, 3, 6, 5))"),
        (GREY, (12, 10), "arrays are not resized"),
        (GREY, (1, 12, 10), "arrays are not resized"),
        (GREY, (5, 6), "arrays are not resized"),
        (GREY, (2, 3, 6, 5), "arrays are not resized"),
        (GREY, (), "arrays are not resized"),
        (COLOUR, (6, 5), "arrays are not resized"),
        (COLOUR, (2, 6, 5), "arrays are not resized"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_an_array_of_another_shape_is_refused_with_what_it_looks_like(reader, shape, mend, dtype, resize):
    with pytest.raises(WrongShape) as refusal:
        reader.read([parse_npy(npy(np.zeros(shape, dtype)))], ImageOptions(resize=resize))
    assert mend in str(refusal.value)
    assert str(list(shape)) in str(refusal.value)


@pytest.mark.parametrize("dtype", ["?", "i1", "<i2", ">i4", "<i8", ">u4", "<u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_integers_from_0_to_255_are_read_as_uint8_and_bool_as_the_ends_of_the_range(dtype, order):
    pixels = NOISE[:6, :5] // 2
    values = np.asarray(pixels > 60 if dtype == "?" else pixels, dtype, order=order)
    expected = (pixels > 60) if dtype == "?" else pixels / 255
    np.testing.assert_allclose(one(GREY, parse_npy(npy(values)))[0], expected, atol=1e-6)


@pytest.mark.parametrize(("dtype", "value"), [("int8", -1), ("int64", 256), ("uint32", 65535), ("int64", -(2**63))])
def test_integers_outside_0_to_255_are_refused(dtype, value):
    values = np.asarray(NOISE[:6, :5] // 2, dtype)
    values[2, 2] = value
    with pytest.raises(OutOfRange, match=f"{value}, and integers are pixels from 0 to 255"):
        one(GREY, values)


def test_an_npy_batch_is_held_to_the_limit_and_to_having_an_image():
    with pytest.raises(TooManyImages, match="5 images, at most 4"):
        GREY.read([np.zeros((5, 6, 5))])
    with pytest.raises(EmptyBatch):
        GREY.read([np.zeros((0, 6, 5))])


@given(st.integers(0, 10_000))
def test_a_truncated_npy_file_is_refused_wherever_it_is_cut(at):
    data = npy(np.zeros((6, 5), np.float32))
    with pytest.raises(UndecodableNpy):
        parse_npy(data[: at % len(data)])


def test_an_npy_file_with_something_after_its_end_is_refused():
    with pytest.raises(UndecodableNpy, match="nothing after it"):
        parse_npy(npy(np.zeros((6, 5))) + b"x")


def test_an_npy_file_that_promises_more_than_it_holds_is_refused_without_allocating_it():
    data = npy(np.zeros((6, 5), np.uint8)).replace(b"(6, 5)", b"(6, 9999999999999999)")
    with pytest.raises(UndecodableNpy):
        parse_npy(data)


@pytest.mark.parametrize("shape", [b"(-6,-5)", b"(6.,5.)", b"('a', )", b"6     "])
def test_an_npy_file_of_a_nonsensical_shape_is_refused(shape):
    with pytest.raises(UndecodableNpy):
        parse_npy(npy(np.zeros((6, 5), np.uint8)).replace(b"(6, 5)", shape))


def test_an_npy_file_of_objects_is_refused_unread():
    with pytest.raises(ObjectArray, match="unpickled"):
        parse_npy(npy(np.array([{"a": 1}, None], dtype=object)))


@pytest.mark.parametrize("dtype", ["complex64", "longdouble", "U4", "f4,f4", "M8[s]"])
def test_an_npy_file_of_another_type_is_refused(dtype):
    with pytest.raises(UnsupportedDtype, match=r"uint8, uint16, .* float64"):
        parse_npy(npy(np.zeros((6, 5), dtype)))


@given(st.binary(max_size=200))
def test_any_bytes_are_an_npy_file_or_refused(data):
    for prefix in (b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"\x93NUMPY\x01\x00\x76\x00{'descr': '"):
        with suppress(RequestError):
            parse_npy(prefix + data)
