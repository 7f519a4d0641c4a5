"""What an image may be given as, and what bounds it."""

from __future__ import annotations

import base64
import http.server
import io
import os
import struct
import threading
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxserve.errors import InvalidRequestError
from jaxserve.media import paths, urls
from jaxserve.media.limits import MediaLimits
from jaxserve.media.sources import fetched, rgb_of
from tests.pictures import file_of, noise, text_of

IMAGE = noise(40, 30)
PNG = file_of(IMAGE)
WANTED = np.asarray(IMAGE)
LIMITS = MediaLimits(pixels=100_000)


def load(item, limits=LIMITS):
    return rgb_of(item, fetched(item, "image_data[2][1]", 1, limits), "image_data[2][1]", 1, limits)


def refused(item, *fragments, limits=LIMITS):
    with pytest.raises(InvalidRequestError) as error:
        load(item, limits)
    text = str(error.value)
    start = "image_data[2][1]: An exception occurred while loading IMAGE data at index 1: Error "
    assert text.startswith(start + "while loading data ") and len(text) < 1000, text
    assert all(fragment in text for fragment in fragments), text
    return text


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        if name.startswith("to/"):
            self.send_response(302)
            self.send_header("Location", base64.urlsafe_b64decode(name[3:]).decode())
            self.end_headers()
        elif name == "missing":
            self.send_error(404)
        elif name == "silent":
            self.server.release.wait(10)
        elif name == "drip":
            self.answer(1000)
            while not self.server.release.wait(0.02):
                self.wfile.write(b"x")
        elif name == "short":
            self.answer(len(PNG) + 10)
            self.wfile.write(PNG)
        elif name == "endless":
            self.answer(None)
            for _ in range(64):
                self.wfile.write(bytes(1 << 18))
        else:
            assert self.headers["User-Agent"] == "jaxserve"
            self.answer(len(PNG))
            self.wfile.write(PNG)

    def answer(self, size):
        self.send_response(200)
        if size is not None:
            self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    release = threading.Event()

    def handle_error(self, request, client_address):
        """A client that hangs up is what is tested."""


@pytest.fixture(scope="module")
def site():
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        Server.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cat 1.png").write_bytes(PNG)
    (tmp_path / "secret.txt").write_text("the secret of secrets, as long as base64 of an image is")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_form_is_the_same_image(folder, site):
    path = folder / "in" / "cat 1.png"
    forms = [
        IMAGE,
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        str(path),
        path,
        "in/cat 1.png",
        "file://" + str(path).replace(" ", "%20"),
        f"file://localhost{path}",
        f"data:image/png;base64,{text_of(PNG)}",
        f"DATA:;base64,{text_of(PNG).rstrip('=')}",
        text_of(PNG),
        base64.encodebytes(PNG).decode(),
        f"{site}/cat.png",
        f"{site}/to/{base64.urlsafe_b64encode(f'{site}/cat.png'.encode()).decode()}",
        types.SimpleNamespace(url=text_of(PNG), detail="high"),
        {"url": str(path), "detail": "auto"},
        types.SimpleNamespace(url=IMAGE),
    ]
    for form in forms:
        np.testing.assert_array_equal(np.asarray(load(form)), WANTED, str(form)[:60])


def test_base64_of_a_jpeg_is_no_path():
    content = file_of(IMAGE, "JPEG", quality=95)
    text = text_of(content)
    assert text.startswith("/9j/") and load(text).size == IMAGE.size


def test_images_are_converted_as_upstream_does():
    for mode in ("RGBA", "LA", "P", "L", "1", "CMYK"):
        image = noise(20, 10, mode)
        np.testing.assert_array_equal(load(image), image.convert("RGB"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert load(file_of(IMAGE, "JPEG", exif=exif)).size == IMAGE.size
    frames = [noise(16, 16, seed=seed).quantize() for seed in range(3)]
    for kind in ("GIF", "WEBP", "PNG"):
        animated = file_of(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(load(animated), frames[0].convert("RGB"), kind)


def bomb(width, height):
    """A PNG that claims a size, in 70 bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", b"x\x9c"), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("item", "fragments"),
    [
        (b"", ["0 bytes"]),
        (PNG[:200], ["cannot be decoded"]),
        (file_of(noise(90, 90), "JPEG")[:-500], ["cannot be decoded", "truncated"]),
        (b"GIF89a", ["none of PNG"]),
        (b"hello" * 100, ["none of PNG, JPEG"]),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ["none of PNG"]),
        (bomb(400, 400), ["400 x 400 pixels are more than max_image_pixels=100000"]),
        (bomb(100_000, 100_000), ["more pixels than Pillow decodes"]),
        (noise(400, 400), ["400 x 400", "max_image_pixels=100000"]),
        (Image.new("RGB", (0, 5)), ["no pixels (0 x 5)"]),
        (np.zeros((4, 4, 3), np.uint8), ["Invalid image"]),
        (5, ["Invalid image", "5 (int)"]),
        ({}, ["Invalid image"]),
        ({"url": 5}, ["Invalid image"]),
        ("", ["no URL, no path"]),
        ("cat.png", ["no URL, no path", "'cat.png'"]),
        ("x" * 10_001, ["no URL, no path"]),
        ("/no/such/cat.png", ["no such file", "'/no/such/cat.png'"]),
        ("\0", ["no URL"]),
        ("/x\0", ["not a path"]),
        ("/" + "x" * 5000, ["a path of 5001 characters"]),
        ("/tmp", ["a folder, not a file"]),
        ("file:///tmp", ["a folder"]),
        ("file://host/cat.png", ["another host"]),
        (Path("/dev/zero"), ["not a regular file"]),
        ("data:image/png", ["without a comma"]),
        ("data:image/png,abc", ["not base64"]),
        ("data:;base64,====x", ["damaged"]),
        ("http://", ["with a host"]),
        ("http://[x", ["no URL"]),
        ("http://127.0.0.1:1/x.png", ["cannot be reached"]),
        ("https://127.0.0.1:99999/", ["no URL"]),
    ],
    ids=range(32),
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_image(item, fragments):
    refused(item, *fragments)


def test_servers_are_bounded(site, monkeypatch):
    monkeypatch.setattr(urls, "WAIT", 0.2)
    monkeypatch.setattr(urls, "LONGEST", 0.5)
    started = time.monotonic()
    refused(f"{site}/missing", "the server answers 404")
    refused(f"{site}/silent", "nothing for 0.2 s")
    refused(f"{site}/drip", "not there after 0.5 s")
    refused(f"{site}/short", f"ended after {len(PNG)} of {len(PNG) + 10} bytes")
    small = MediaLimits(url_bytes=1 << 20)
    refused(f"{site}/endless", "more than 1 MiB", limits=small)
    assert time.monotonic() - started < 8
    refused(f"{site}/cat", "media_url_max_file_size_mb=0", limits=MediaLimits(url_bytes=0))


def test_redirections_lead_only_where_one_may_ask(site):
    def to(place):
        return f"{site}/to/{base64.urlsafe_b64encode(place.encode()).decode()}"

    refused(to("file:///etc/passwd"), "the server answers 302")
    refused(to("ftp://127.0.0.1/x"), "only http and https")
    around = to(f"{site}/cat.png")
    for _ in range(urls.MOST_REDIRECTIONS):
        around = to(around)
    refused(around, "the server answers 302")
    here = MediaLimits(domains=("127.0.0.1",))
    assert load(f"{site}/cat.png", here).size == IMAGE.size
    refused(to("http://localhost/"), "'localhost' is not in allowed_media_domains", limits=here)
    refused(f"{site}/x", "'127.0.0.1' is not", limits=MediaLimits(domains=("example.org",)))


def test_files_outside_the_folder_are_nobodys(folder):
    inside = MediaLimits(folder=str(folder / "in"))
    assert load("in/cat 1.png", inside).size == IMAGE.size
    (folder / "in" / "link.png").symlink_to(folder / "in" / "cat 1.png")
    assert load(str(folder / "in" / "link.png"), inside).size == IMAGE.size
    (folder / "in" / "out.png").symlink_to(folder / "secret.txt")
    (folder / "inner.png").write_bytes(PNG)
    (folder / "in-other.png").write_bytes(PNG)
    for name in ("in/out.png", "in/../secret.txt", "secret.txt", "none.txt", "in-other.png"):
        for item in (str(folder / name), f"file://{folder}/{name}"):
            text = refused(item, "no such file in allowed_local_media_path", limits=inside)
            assert "of secrets" not in text
        refused(name, "no URL, no path of a file that may be read", limits=inside)
    for item in (str(folder / "in" / "cat 1.png"), "file:///x.png", Path("in/cat 1.png")):
        refused(item, "allowed_local_media_path=''", limits=MediaLimits(folder=""))
    refused("in/cat 1.png", "no path", limits=MediaLimits(folder=""))
    assert "of secrets" not in refused(str(folder / "secret.txt"), "none of PNG")


def test_pipes_and_long_files_hold_nobody_up(folder, monkeypatch):
    os.mkfifo(folder / "pipe.png")
    refused(str(folder / "pipe.png"), "not a regular file")
    monkeypatch.setattr(paths, "MOST_FILE_BYTES", 1 << 20)
    with open(folder / "long.png", "wb") as file:
        file.truncate(1 << 40)
    refused(str(folder / "long.png"), "more than 1 MiB")


def test_a_lazy_image_is_counted_before_it_is_decoded():
    image = Image.open(io.BytesIO(bomb(5000, 5000)))
    refused(image, "5000 x 5000")


def test_damaged_files_are_images_or_errors():
    """Whatever Pillow's decoders meet, warnings of theirs included."""
    random = np.random.default_rng(0)
    kinds = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")
    files = [file_of(noise(30, 20), kind) for kind in kinds]
    outcomes = []
    for number in range(400):
        content = np.frombuffer(files[number % len(files)], np.uint8).copy()
        places = random.integers(0, len(content), random.integers(1, 8))
        content[places] = random.integers(0, 256, len(places))
        try:
            image = load(content[: random.integers(len(content) // 2, len(content) + 1)].tobytes())
            outcomes.append(image.mode == "RGB" and image.width * image.height <= LIMITS.pixels)
        except InvalidRequestError as error:
            outcomes.append(len(str(error)) < 1000)
    assert all(outcomes) and len(outcomes) == 400
