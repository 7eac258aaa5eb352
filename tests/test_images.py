"""Image sources -> arrays: formats, shapes, values, limits."""

from __future__ import annotations

import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from carso.bundle import InputSpec
from carso.errors import (
    AnimatedImage,
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
    WrongShape,
)
from carso.images.npy import parse as parse_npy
from carso.images.reader import Reader
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from tests.pictures import encoded, npy, saved

GREY = Reader(InputSpec(shape=(1, 6, 5)), max_images=4, max_pixels=1000)
COLOUR = Reader(InputSpec(shape=(3, 6, 5), low=-1, high=1), max_images=4, max_pixels=1000)

grey_pixels = arrays.arrays(np.uint8, (6, 5))
colour_pixels = arrays.arrays(np.uint8, (6, 5, 3))
LOSSLESS = ({"kind": "PNG"}, {"kind": "BMP"}, {"kind": "WEBP", "lossless": True, "exact": True})
KINDS = (*LOSSLESS, {"kind": "JPEG"})


def one(reader: Reader, source: object, *, resize: bool = False) -> np.ndarray:
    batch = reader.read([source], resize=resize)
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


@given(arrays.arrays(np.uint16, (6, 5)))
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
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0]), Image.fromarray(pixels).convert("CMYK")):
        np.testing.assert_allclose(one(GREY, saved(image, "JPEG")), 200 / 255, atol=0.02)


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


def plain(mode: str) -> Image.Image:
    """Every pixel is 7."""
    image = Image.new(mode, (5, 6), 7)
    if mode == "P":
        image.putpalette(range(48))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "I;16"])
def test_a_transparent_pixel_is_refused(mode):
    if mode == "RGBA":
        pixels = np.full((6, 5, 4), 255, np.uint8)
        pixels[2, 3, 3] = 254
        data = encoded(pixels)
    elif mode == "LA":
        data = saved(Image.new("LA", (5, 6), (9, 0)))
    else:
        data = saved(plain(mode), transparency=7)
    with pytest.raises(TransparentImage, match="background"):
        one(GREY, data)


@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_a_transparent_colour_that_no_pixel_has_changes_nothing(mode):
    data = saved(plain(mode), transparency=8)
    assert np.ptp(one(GREY, data)) == 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animated_image_is_refused(kind):
    frames = [Image.new("RGB", (5, 6), colour) for colour in ("red", "green", "blue")]
    with pytest.raises(AnimatedImage, match="3 frames"):
        one(GREY, saved(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_a_photo_with_previews_is_its_first_frame():
    frames = [Image.new("RGB", (5, 6), colour) for colour in ("white", "black")]
    photo = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(one(GREY, photo), 1, atol=0.02)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(kind):
    with pytest.raises(UndecodableImage, match="PNG, JPEG, WebP or BMP"):
        one(GREY, saved(Image.new("L", (5, 6)), kind))


@given(colour_pixels, st.sampled_from(KINDS), st.integers(1, 1000))
def test_a_truncated_image_is_refused_wherever_it_is_cut(pixels, options, missing):
    data = encoded(pixels, **options)
    with pytest.raises(UndecodableImage):
        one(COLOUR, data[: max(len(data) - missing, 0)])


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
    data = encoded(np.zeros((height, width), np.uint8))
    if (height, width) == (6, 5):
        one(GREY, data)
    else:
        with pytest.raises(WrongShape) as refusal:
            one(GREY, data)
        assert f"[1, {height}, {width}]" in str(refusal.value)
        assert "[1, 6, 5]" in str(refusal.value)
        assert "resize=true" in str(refusal.value)


@given(st.integers(1, 25), st.integers(1, 25), st.integers(0, 255))
def test_resizing_gives_the_shape_of_the_bundle_and_keeps_an_even_image_even(height, width, value):
    image = one(COLOUR, encoded(np.full((height, width), value, np.uint8)), resize=True)
    np.testing.assert_allclose(image, value / 127.5 - 1, atol=1e-5)
    assert image.min() >= -1 and image.max() <= 1


def test_resizing_skips_no_pixel():
    checkers = (np.indices((30, 25)).sum(axis=0) % 2 * 255).astype(np.uint8)
    np.testing.assert_allclose(one(GREY, encoded(checkers), resize=True), 0.5, atol=0.05)


def test_numbers_are_resized_too():
    assert one(GREY, [[0.25] * 7] * 9, resize=True).mean() == 0.25


@pytest.mark.parametrize("side", [32, 10_000, 30_000])
def test_more_pixels_than_the_cap_are_refused_before_decoding(side):
    header = encoded(np.zeros((1, 1), np.uint8))
    chunk = b"IHDR" + side.to_bytes(4) * 2 + header[24:29]
    bomb = header[:12] + chunk + zlib.crc32(chunk).to_bytes(4) + header[33:]
    with warnings.catch_warnings(), pytest.raises(TooManyPixels, match="pixels"):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        one(GREY, bomb, resize=True)


def test_the_cap_on_pixels_is_on_all_images_of_a_request_together():
    fits = encoded(np.zeros((20, 25), np.uint8))
    assert len(GREY.read([fits, fits], resize=True)) == 2
    with pytest.raises(TooManyPixels, match="image 2"):
        GREY.read([fits, fits, fits], resize=True)


def test_several_sources_make_one_batch_in_their_order():
    dark, light = np.zeros((6, 5), np.uint8), np.full((6, 5), 255, np.uint8)
    batch = GREY.read([encoded(light), dark.tolist(), encoded(light, "BMP")], resize=False)
    assert batch.mean(axis=(1, 2, 3)).tolist() == [1, 0, 1]


@given(arrays.arrays(np.float64, (6, 5), elements=st.floats(0, 1)))
def test_nested_numbers_are_taken_as_they_are(values):
    expected = values.astype(np.float32)
    np.testing.assert_array_equal(one(GREY, values.tolist())[0], expected)
    np.testing.assert_array_equal(one(GREY, [values.tolist()])[0], expected)
    np.testing.assert_array_equal(one(COLOUR, [values.tolist()] * 3), [expected] * 3)


@pytest.mark.parametrize("shape", [(5, 6), (6, 6), (30,), (2, 6, 5), (3, 6, 5), (1, 1, 6, 5)])
def test_nested_numbers_of_another_shape_are_refused(shape):
    with pytest.raises(WrongShape, match=r"takes \[1, 6, 5\]"):
        one(GREY, np.zeros(shape).tolist())


@pytest.mark.parametrize(
    ("source", "refusal"),
    [
        ([[0.5] * 5] * 5 + [[0.5] * 4], RaggedArray),
        ([[0.5] * 5] * 5 + [0.5], RaggedArray),
        ([[0.5] * 5] * 5 + [[0.5] * 4 + [None]], NotNumbers),
        ([[0.5] * 5] * 5 + [[0.5] * 4 + ["0.5"]], NotNumbers),
        ([[True] * 5] * 6, NotNumbers),
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
    batch = reader.read([parse_npy(npy(np.asarray(values, dtype, order=order)))], resize=False)
    expected = (spec.low + (spec.high - spec.low) * levels / 255).reshape(images, *spec.shape)
    np.testing.assert_allclose(batch, expected, atol=1e-3 if "2" in dtype else 1e-6)


@pytest.mark.parametrize(
    ("reader", "shape"),
    [(GREY, (5, 6)), (GREY, (2, 3, 6, 5)), (GREY, (30,)), (GREY, ()), (COLOUR, (6, 5)), (COLOUR, (2, 6, 5))],
)
def test_an_npy_file_of_another_shape_is_refused(reader, shape):
    with pytest.raises(WrongShape):
        reader.read([parse_npy(npy(np.zeros(shape, np.float32)))], resize=False)


def test_an_npy_batch_is_held_to_the_limit_and_to_having_an_image():
    with pytest.raises(TooManyImages, match="5 images, at most 4"):
        GREY.read([np.zeros((5, 6, 5))], resize=False)
    with pytest.raises(EmptyBatch):
        GREY.read([np.zeros((0, 6, 5))], resize=False)


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


@pytest.mark.parametrize(
    "dtype", ["int8", "uint16", "int64", "bool", "complex64", "longdouble", "U4", "f4,f4", "M8[s]"]
)
def test_an_npy_file_of_another_type_is_refused(dtype):
    with pytest.raises(UnsupportedDtype, match="uint8, float16, float32, float64"):
        parse_npy(npy(np.zeros((6, 5), dtype)))


@given(st.binary(max_size=200))
def test_any_bytes_are_an_npy_file_or_refused(data):
    for prefix in (b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"\x93NUMPY\x01\x00\x76\x00{'descr': '"):
        with suppress(RequestError):
            parse_npy(prefix + data)
