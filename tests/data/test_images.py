"""Image files of every kind, good and bad, through the store: the pixels are transformers', the rest is BadImage."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin

from capcur_jax.data.images import ImageStore
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import BadImage, Processor
from tests.conftest import random_image

SIZE = (24, 16)  # height, width of what is loaded, where it does not matter


@pytest.fixture(scope="module", params=[0, 2], ids=["here", "workers"])
def store(request):
    with ImageStore(request.param) as found:
        yield found


@pytest.fixture(scope="module", params=["checkpoint", "windowed_checkpoint"], ids=["qwen3_vl", "qwen2_5_vl"])
def family(request):
    """The processor of either family."""
    return Processor.from_directory(request.getfixturevalue(request.param))


def built(store, processor, path):
    return PromptBuilder(processor, "suffix", 10**6, 10**6, store).build(Problem("1", "x", "y", (str(path),)))


def assert_as_transformers(store, processor, path, plain=None):
    """The prompt through the store is transformers' own of the plainly opened image, and was measured right."""
    problem = Problem("1", "x", "y", (str(path),))
    builder = PromptBuilder(processor, "suffix", 10**6, 10**6, store)
    prompt = builder.build(problem)
    if plain is None:
        with Image.open(path) as image:
            plain = ImageOps.exif_transpose(image)
    wanted = processor.prepare(builder.render(problem), [plain])
    np.testing.assert_array_equal(prompt.patches, wanted.patches)
    np.testing.assert_array_equal(prompt.tokens, wanted.tokens)
    assert prompt.grids == wanted.grids and builder.measure(problem) == PromptSize.of(wanted)


# ---------------------------------------------------------------------- the pixels


@pytest.mark.parametrize(
    "size", [(1, 1), (2, 1), (3, 200), (150, 1), (16, 16), (37, 50), (64, 64), (301, 299), (900, 7)]
)
def test_patches_are_those_of_transformers_at_every_size(store, family, tmp_path, size):
    random_image(*size).save(tmp_path / "a.png")
    random_image(*size).save(tmp_path / "a.jpg")
    for name in ("a.png", "a.jpg"):
        assert_as_transformers(store, family, tmp_path / name)


def test_images_are_resized_once_where_a_second_time_would_change_them(checkpoint, tmp_path):
    """Where the bounds leave no room, what smart_resize gives is not what it leaves alone."""
    tight = Processor.from_directory(checkpoint, min_pixels=4096, max_pixels=4096)
    assert tight.resized(*tight.resized(22, 12)) != tight.resized(22, 12)
    random_image(12, 22).save(tmp_path / "a.png")
    assert_as_transformers(ImageStore(), tight, tmp_path / "a.png")


def save_kinds(folder):
    """One file of each format and mode that needs no rule of our own."""
    rgb, alpha = random_image(37, 50), random_image(37, 50, seed=1).convert("L")
    rgba, la = rgb.copy(), rgb.convert("L")
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    palette = rgb.quantize(17)
    for mode in ("1", "L", "P", "RGB"):
        rgb.convert(mode).save(folder / f"{mode}.png")
    rgba.save(folder / "rgba.png")
    la.save(folder / "la.png")
    palette.save(folder / "colour.png", transparency=3)
    palette.save(folder / "palette_alpha.png", transparency=bytes(range(0, 255, 15)))
    rgb.convert("L").save(folder / "gray_key.png", transparency=100)
    rgb.quantize(4).convert("RGB").save(
        folder / "rgb_key.png", transparency=rgb.quantize(4).convert("RGB").getpixel((0, 0))
    )
    for mode in ("L", "RGB", "CMYK"):
        rgb.convert(mode).save(folder / f"{mode}.jpg")
        rgb.convert(mode).save(folder / f"{mode}.tif", compression="tiff_lzw")
    rgb.save(folder / "progressive.jpg", progressive=True, quality=70)
    rgb.convert("YCbCr").save(folder / "ycbcr.tif")
    rgb.convert("LAB").save(folder / "lab.tif")
    rgba.save(folder / "rgba.tif")
    palette.save(folder / "plain.gif")
    palette.save(folder / "key.gif", transparency=3)
    rgba.save(folder / "rgba.webp", lossless=True)
    rgba.save(folder / "rgba.avif")
    rgb.save(folder / "a.bmp")
    rgb.save(folder / "a.ppm")
    rgba.save(folder / "a.jp2")
    return sorted(folder.iterdir())


def test_patches_are_those_of_transformers_in_every_mode(store, family, tmp_path):
    modes = set()
    for path in save_kinds(tmp_path):
        with Image.open(path) as image:
            modes.add(image.mode)
        assert_as_transformers(store, family, path)
    assert modes >= {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"}


def test_transparency_is_white(store, tmp_path):
    clear = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    clear.paste((0, 0, 200, 255), (0, 0, 16, 8))
    clear.save(tmp_path / "a.png")
    clear.convert("P").save(tmp_path / "b.gif", transparency=clear.convert("P").getpixel((0, 15)))
    for name in ("a.png", "b.gif"):
        pixels = store.load(str(tmp_path / name), (16, 16))
        assert (pixels[8:] == 255).all() and (pixels[:8, :, 0] < 20).all() and (pixels[:8, :, 2] > 180).all(), name


def deep(values, path):
    Image.fromarray(np.array(values)).save(path)
    return str(path)


def test_deep_grayscale_keeps_its_range(store, tmp_path):
    """Pillow alone makes white of everything above 255, and black of floats up to 1."""

    def gray(values, name):
        path = deep(values, tmp_path / name)
        pixels = store.load(path, np.shape(values))
        assert (pixels == pixels[..., :1]).all()
        return pixels[0, :, 0].tolist()

    sixteen = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert gray(sixteen, "a.png") == gray(sixteen, "b.tif") == [0, 1, 128, 255]
    assert gray(np.array([[0, 100, 200, 5000]], np.uint16), "dark.png") == [0, 0, 1, 19]
    twelve = np.array([[0, 16, 2048, 4095]], np.uint16)  # 12 bits in the 16 of a PNG
    assert gray(twelve, "twelve.png") == gray(twelve, "twelve.tif") == [0, 1, 128, 255]
    assert gray(sixteen.astype(np.int32), "c.tif") == [0, 1, 128, 255]
    assert gray(np.array([[0, 1, 128, 255]], np.int32), "d.tif") == [0, 1, 128, 255]
    assert gray(np.array([[-1000, 0, 1000]], np.int32), "e.tif") == [0, 128, 255]
    assert gray(np.array([[70000, 140000]], np.int32), "f.tif") == [0, 255]
    assert gray(np.array([[0, 0.5, 1]], np.float32), "g.tif") == [0, 128, 255]
    assert gray(np.array([[0, 1, 128, 255]], np.float32), "h.tif") == [0, 1, 128, 255]
    assert gray(np.array([[-1, 1, np.nan, 3, np.inf]], np.float32), "i.tif") == [0, 128, 0, 255, 0]
    assert gray(np.full((1, 3), np.nan, np.float32), "j.tif") == [0, 0, 0]
    (tmp_path / "k.pgm").write_bytes(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 255, 65535))
    assert store.load(str(tmp_path / "k.pgm"), (1, 3))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_the_first_frame_counts(store, family, tmp_path, name):
    frames = [Image.new("RGB", (40, 24), colour) for colour in ("red", "green", "blue")]
    frames[0].save(
        tmp_path / name, save_all=True, append_images=frames[1:], **({} if name == "a.tif" else {"duration": 50})
    )
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
    pixels = store.load(str(tmp_path / name), SIZE)
    assert (pixels[..., 0] > 240).all() and (pixels[..., 1:] < 16).all()
    assert_as_transformers(store, family, tmp_path / name)


# ---------------------------------------------------------------------- upright


def late_chunk(path, kind, content):
    """Puts a chunk behind a PNG's pixels."""
    whole = path.read_bytes()
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(whole[:-12] + chunk + whole[-12:])


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_seen_upright(store, family, tmp_path, orientation):
    image, exif = random_image(60, 23), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = exif.tobytes()
    for name in ("a.png", "a.jpg", "a.tif", "a.webp", "a.avif"):
        image.save(tmp_path / name, exif=content)
    image.save(tmp_path / "lzw.tif", exif=content, compression="tiff_lzw")
    for name in ("late.png", "late_xmp.png", "xmp.png"):
        image.save(tmp_path / name)
    late_chunk(tmp_path / "late.png", b"eXIf", content.removeprefix(b"Exif\0\0"))
    xmp = XMP.format(orientation)
    late_chunk(tmp_path / "late_xmp.png", b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp.encode())
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    image.save(tmp_path / "xmp.png", pnginfo=info)
    image.save(tmp_path / "xmp.jpg", xmp=xmp.encode())
    for path in sorted(tmp_path.iterdir()):
        assert store.size(str(path)) == ((60, 23) if orientation >= 5 else (23, 60)), path.name
        assert_as_transformers(store, family, path)


def test_exif_that_can_t_be_read_says_nothing(store, tmp_path):
    image = random_image(60, 23)
    for value in (0, 9, 1000):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = value
        image.save(tmp_path / "a.jpg", exif=exif)
        assert store.size(str(tmp_path / "a.jpg")) == (23, 60)
    image.save(tmp_path / "b.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert store.size(str(tmp_path / "b.jpg")) == (23, 60)
    assert store.load(str(tmp_path / "b.jpg"), SIZE).shape == (*SIZE, 3)


def test_no_pixel_is_decoded_for_a_size(monkeypatch, tmp_path):
    """Not even of a PNG without EXIF, which Pillow's getexif decodes."""
    names = ("a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tif", "a.ppm")
    for name in names:
        random_image(20, 30).save(tmp_path / name)
    for kind in (ImageFile.ImageFile, Image.Image):
        monkeypatch.setattr(kind, "load", lambda image: pytest.fail(f"decoded a {image.format}"))
    for name in names:
        assert ImageStore().size(str(tmp_path / name)) == (30, 20)


# ---------------------------------------------------------------------- what is refused


def png_of(width, height, *chunks):
    """A PNG of that size by its header, with chunks in place of pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


def bad_files(folder):
    """Paths that hold no usable image; the words that their message has to hold."""
    random_image(23, 37).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "whole.png").unlink()
    random_image(1658, 11).save(folder / "rounded.png")
    random_image(300, 1).save(folder / "narrow.png")
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "header.png").write_bytes(whole[:20])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image at all")
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    pixels = zlib.compress(b"\0" * 1000)
    for name, size in (("warned", (10_001, 10_000)), ("bomb", (30_000, 30_000)), ("bomb2", (2**31 - 1, 2**31 - 1))):
        (folder / f"{name}.png").write_bytes(png_of(*size, (b"IDAT", pixels)))
    (folder / "no_width.png").write_bytes(png_of(0, 10, (b"IDAT", pixels)))
    jpeg = io.BytesIO()
    random_image(320, 320).save(jpeg, "JPEG")
    (folder / "half.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    return {
        "rounded": "the model would see", "narrow": "aspect ratio", "truncated": "not a readable image",
        "header": "not a readable image", "empty": "known format", "text": "known format", "script": "known format",
        "folder": "not a file", "loop": "symbolic links", "pipe": "not a file", "half": "last bytes are missing",
        "warned": "10001 x 10000 pixels, and 100000000 are allowed", "bomb": "pixels", "bomb2": "pixels",
        "no_width": "known format",
    }  # fmt: skip


def test_bad_files_are_named_with_what_is_wrong_and_nothing_is_printed(store, processor, tmp_path, capfd):
    """Their headers alone are enough for most; what only the pixels show, only loading says."""
    wanted = bad_files(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(wanted)
    builder = PromptBuilder(processor, "suffix", 10**6, 10**6, store)
    paths = [*tmp_path.iterdir(), tmp_path / "missing.png", tmp_path / ("long" * 200), "a\0b.png", "/dev/zero"]
    wanted |= {"missing": "no such image", "long" * 200: "File name too long", "a\0b": "null", "zero": "not a file"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for path in map(str, paths):
            problem = Problem(path, "x", "y", (path,))
            stem = os.path.splitext(os.path.basename(path))[0]
            with pytest.raises(BadImage) as caught:
                builder.build(problem)
            message = str(caught.value)
            assert message.startswith(f"{path}: ") and message.endswith("take the row out"), message
            assert wanted[stem] in message and len(message) < len(path) + 250
            if stem not in ("truncated", "half"):
                with pytest.raises(BadImage):
                    builder.measure(problem)
            assert builder.try_build(problem) is None and builder.skipped[problem] == message
    assert builder.counts == {"images": len(paths)}
    assert not seen and capfd.readouterr() == ("", "")


def test_a_jpeg_without_its_last_bytes_is_read_as_viewers_show_it(store, tmp_path):
    whole, flawed = random_image(320, 320), len(store.flaws)
    for progressive in (False, True):
        whole.save(tmp_path / "whole.jpg", progressive=progressive)
        data, wanted = (tmp_path / "whole.jpg").read_bytes(), store.load(str(tmp_path / "whole.jpg"), (320, 320))
        for missing in (1, 2, 20):
            path = str(tmp_path / f"{progressive}{missing}.jpg")
            with open(path, "wb") as file:
                file.write(data[:-missing])
            assert store.size(path) == (320, 320)
            pixels = store.load(path, (320, 320))
            np.testing.assert_array_equal(pixels[:280], wanted[:280]) if not progressive else None
            assert np.abs(pixels.astype(int) - wanted).mean() < (0.01 if missing < 3 else 4)
            assert store.flaws[path] == "its last bytes are missing"
    assert store.counters()["flawed"] == flawed + 6 and str(tmp_path / "whole.jpg") not in store.flaws


@pytest.mark.parametrize("texts", [1, 70], ids=["one", "many"])
def test_a_png_with_large_texts_is_read_without_them(store, tmp_path, texts):
    random_image(20, 30).save(tmp_path / "plain.png")
    info = PngImagePlugin.PngInfo()
    for number in range(texts):
        info.add_text(f"comment {number}", "a" * (2**20 - 1 if texts > 1 else 2**23), zip=True)
    random_image(20, 30).save(tmp_path / "early.png", pnginfo=info)
    random_image(20, 30).save(tmp_path / "late.png")
    late_chunk(tmp_path / "late.png", b"zTXt", b"comment\0\0" + zlib.compress(b"a" * 2**23))
    for path in (str(tmp_path / "early.png"), str(tmp_path / "late.png")):
        assert store.size(path) == (30, 20)
        np.testing.assert_array_equal(store.load(path, SIZE), store.load(str(tmp_path / "plain.png"), SIZE))
        assert "texts are too large" in store.flaws[path]


def test_the_limit_of_pixels_is_exact(tmp_path):
    random_image(30, 20).save(tmp_path / "a.png")
    assert ImageStore(max_pixels=600).size(str(tmp_path / "a.png")) == (20, 30)
    for method in ("size", "load"):
        with pytest.raises(BadImage, match=r"a\.png: 30 x 20 pixels, and 599 are allowed"):
            getattr(ImageStore(max_pixels=599), method)(str(tmp_path / "a.png"), *([SIZE] if method == "load" else []))


@pytest.mark.skipif(os.getuid() == 0, reason="everything is readable")
def test_a_file_that_may_not_be_read_is_a_bad_image(store, tmp_path):
    random_image(3, 3).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(BadImage, match=r"a\.png: not a readable image \(Permission denied"):
        store.size(str(tmp_path / "a.png"))


FUZZED = ("png", "jpg", "gif", "webp", "tif", "bmp", "ppm", "jp2")
EACH = 130  # broken copies of each


def mutants(folder, each):
    """`each` broken copies of a small image in each of the formats: bytes changed, cut out, doubled, cut off."""
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for kind in FUZZED:
        kinds = {"exif": exif} if kind in ("png", "jpg", "webp", "tif") else {}
        if kind == "tif":
            kinds["compression"] = "tiff_lzw"
        if kind == "gif":
            kinds["transparency"] = 1
        random_image(19, 14).save(folder / f"whole.{kind}", **kinds)
        whole = (folder / f"whole.{kind}").read_bytes()
        for number in range(each):
            data = bytearray(whole)
            for _ in range(random.integers(1, 5)):
                at = int(random.integers(len(data) if random.random() < 0.5 else min(len(data), 100)))
                way = random.integers(6)
                if way < 3:
                    data[at] = random.choice([0, 1, 127, 128, 255, int(random.integers(256))])
                elif way == 3:
                    data[at : at + 4] = random.integers(0, 256, 4, dtype=np.uint8).tobytes()
                elif way == 4:
                    del data[at : at + int(random.integers(1, 20))]
                else:
                    data[at:at] = data[at : at + int(random.integers(1, 40))]
                if len(data) < 2:
                    break
            if random.random() < 0.2:
                del data[int(random.integers(len(data))) :]
            path = folder / f"{number}.{kind}"
            path.write_bytes(data)
            yield str(path)


def test_mutated_images_are_read_or_refused(store, tmp_path, capfd):
    """Never another exception, never a word on the terminal but libtiff's, where it is not in a worker."""
    read, refused = 0, 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for path in mutants(tmp_path, EACH):
            for ask in (lambda path=path: store.size(path), lambda path=path: store.load(path, SIZE)):
                try:
                    found = ask()
                except BadImage as error:
                    refused += 1
                    assert str(error).startswith(f"{path}: ") and str(error).endswith("take the row out")
                    assert len(str(error)) < len(path) + 250 and str(error).isprintable()
                else:
                    read += 1
                    assert len(found) == 2 if isinstance(found, tuple) else found.shape == (*SIZE, 3)
    output, errors = capfd.readouterr()
    allowed = "\0" if store._pool else "tempfile.tif: "
    assert not seen and not output and not [line for line in errors.splitlines() if not line.startswith(allowed)]
    assert read > 400 and refused > 400 and read + refused == 2 * EACH * len(FUZZED)
    assert store.counters()["deaths"] == 0  # nor did one take too long: its worker would have been ended


# ---------------------------------------------------------------------- the cache


def test_the_last_used_are_kept_within_the_budget(tmp_path):
    one = 256 * 256 * 3
    store, paths = ImageStore(cache_mb=1), []
    for number in range(7):
        paths.append(str(tmp_path / f"{number}.png"))
        random_image(8, 8, seed=number).save(paths[-1])
    first = store.load(paths[0], (256, 256))
    for path in (*paths[1:5], paths[0], *paths[5:]):  # five fit; 0 is used again, so 1 and 2 have to go
        store.load(path, (256, 256))
    assert store.counters() == {"hits": 1, "misses": 7, "bytes": 5 * one, "deaths": 0, "flawed": 0}
    assert store.load(paths[0], (256, 256)) is first and store.counters()["hits"] == 2
    store.load(paths[1], (256, 256))
    assert store.counters()["misses"] == 8 and store.counters()["bytes"] == 5 * one
    store.load(paths[0], (600, 600))  # does not fit: nothing is lost for it
    assert store.counters()["bytes"] == 5 * one
    assert store.load(paths[0], (256, 128)).shape == (256, 128, 3)  # another size is another image
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0, 0] = 1


def test_a_file_that_changed_is_read_anew(store, tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "red").save(path)
    with ImageStore(cache_mb=1) as kept:
        for used in (store, kept):
            assert used.load(path, (8, 8))[0, 0, 0] == 255
        Image.new("RGB", (8, 12), "blue").save(path)
        os.utime(path, ns=(1, 1))
        for used in (store, kept):
            assert used.size(path) == (12, 8) and used.load(path, (8, 8))[0, 0, 0] == 0
