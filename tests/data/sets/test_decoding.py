"""Decoding of image files: as torchvision and viewers show them, by either decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from dist_train.atomic_files import read_json, write_json
from dist_train.config.data import DataConfig, Decoder
from dist_train.data.sets import settings_check
from dist_train.data.sets.decoding import decode
from dist_train.data.splits import check_data_exists
from dist_train.errors import ConfigError, DataError
from dist_train.inference import predict as module
from dist_train.inference.trained_net import TrainedNet
from dist_train.torchvision_compat import import_torchvision
from support.pictures import picture
from support.processes import DIST_TRAIN
from support.ranks import run_forked, train_on_ranks
from support.run_files import status

DECODERS: tuple[Decoder, ...] = get_args(Decoder)
NUMBERS = np.random.default_rng(0)
by_each_decoder = pytest.mark.parametrize("decoder", DECODERS)


def levels_apart(one: Tensor, other: Tensor) -> int:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == torch.uint8
    return int((one.int() - other.int()).abs().max())


@pytest.fixture(scope="module")
def transforms() -> Any:
    """torchvision.transforms, imported before the test: the import sets environment variables."""
    return import_torchvision().transforms


@pytest.mark.parametrize(
    "size", [(9, 7), (7, 9), (19, 16), (8, 8), (101, 33), (33, 100), (3, 5), (500, 375), (31, 700)]
)
@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@by_each_decoder
def test_decoding_matches_torchvision(
    size: tuple[int, int], name: str, mode: str, decoder: Decoder, transforms: Any, tmp_path: Path
) -> None:
    """To one level: torchvision resizes these by PIL, which rounds in another way."""
    path = picture(tmp_path / name, size, mode)
    for image_size in (16, 5, 40):
        chain = [transforms.Resize(image_size), transforms.CenterCrop(image_size), transforms.PILToTensor()]
        expected = transforms.Compose(chain)(Image.open(path).convert("RGB"))
        assert levels_apart(decode(path, image_size, decoder), expected) <= 1


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    """Any format blends with white: half-transparent pixels by half, opaque pixels keep their bits."""
    opacity = NUMBERS.integers(0, 2, (8, 8), dtype=np.uint8) * 255  # black or transparent
    on_white = torch.from_numpy(255 - opacity).expand(3, 8, 8)
    alpha = Image.fromarray(opacity)
    black = Image.new("L", (8, 8))
    pictures = {"la.png": Image.merge("LA", (black, alpha)), "rgba.webp": Image.merge("RGBA", (black,) * 3 + (alpha,))}
    pictures["p.png"] = pictures["p.gif"] = Image.fromarray(opacity // 255, "P")  # one of two colours is transparent
    pictures["p.png"].putpalette([200, 100, 0, 0, 0, 0])
    for name, made in pictures.items():
        made.save(tmp_path / name, **({"transparency": 0} if made.mode == "P" else {"lossless": True}))
        assert decode(tmp_path / name, 8, "pil").equal(on_white), name
        assert decode(tmp_path / name, 8, "pil", channels=1).equal(on_white[:1]), name
    half = Image.new("RGBA", (8, 8), (0, 0, 255, 128))
    half.save(tmp_path / "half.png")
    assert decode(tmp_path / "half.png", 8, "pil")[:, 0, 0].tolist() == [127, 127, 255]
    opaque = Image.open(picture(tmp_path / "opaque.png", (8, 8))).convert("RGBA")
    opaque.save(tmp_path / "alpha.png")
    assert decode(tmp_path / "alpha.png", 8, "pil").equal(decode(tmp_path / "opaque.png", 8, "pil"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_exif_orientation_is_applied(orientation: int, mode: str, tmp_path: Path) -> None:
    """The result matches PIL's exif_transpose in any format."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    plain = Image.open(picture(tmp_path / "plain.png", (9, 6), "RGB")).convert(mode)
    for name in ("turned.png", "turned.webp", "turned.tiff"):
        plain.save(tmp_path / name, exif=exif, lossless=True)
        ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB").save(tmp_path / "upright.png")
        assert decode(tmp_path / name, 6, "pil").equal(decode(tmp_path / "upright.png", 6, "pil")), name
    assert decode(tmp_path / "turned.png", 6, "pil").equal(decode(tmp_path / "plain.png", 6, "pil")) == (
        orientation == 1
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_are_ignored(tmp_path: Path) -> None:
    drawn = Image.open(picture(tmp_path / "drawn.png"))
    drawn.save(tmp_path / "none.jpg")
    drawn.save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(tmp_path / "broken.jpg", 6, "pil").equal(decode(tmp_path / "none.jpg", 6, "pil"))


def test_sixteen_bits_per_pixel_are_refused_instead_of_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits per pixel"):
        decode(tmp_path / "deep.png", 8, "pil")


# --- simplejpeg --------------------------------------------------------------------------------------------------


@pytest.fixture
def read_by_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that simplejpeg has decoded."""
    decoded: list[bytes] = []
    real = simplejpeg.decode_jpeg

    def decode_jpeg(content: bytes) -> Any:
        pixels = real(content)
        decoded.append(content)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    return decoded


def test_simplejpeg_reads_upright_jpegs_and_pil_all_else(read_by_simplejpeg: list[bytes], tmp_path: Path) -> None:
    colour, grey = picture(tmp_path / "colour.jpg", (30, 20)), picture(tmp_path / "grey.jpg", (30, 20), "L")
    misnamed = picture(tmp_path / "jpeg.jpg", (30, 20)).rename(tmp_path / "jpeg.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = tmp_path / "turned.jpg"
    Image.open(colour).save(turned, exif=exif)
    others = [picture(tmp_path / "x.png"), picture(tmp_path / "cmyk.jpg", (30, 20), "CMYK"), turned]
    for path in (colour, grey, misnamed, *others):
        assert levels_apart(decode(path, 16, "simplejpeg"), decode(path, 16, "pil")) <= 1, path
    assert read_by_simplejpeg == [path.read_bytes() for path in (colour, grey, misnamed)]
    assert levels_apart(decode(colour, 16, "simplejpeg", channels=1), decode(colour, 16, "pil", channels=1)) <= 1
    assert len(read_by_simplejpeg) == 3


@by_each_decoder
def test_transforms_change_the_whole_picture(decoder: Decoder, tmp_path: Path) -> None:
    shapes = []

    def mirrored(pixels: Tensor) -> Tensor:
        shapes.append(list(pixels.shape))
        return pixels.flip(2)

    for name in ("x.jpg", "x.png"):
        path = picture(tmp_path / name, (40, 20))  # its square is in the middle
        found = decode(path, 10, decoder, transforms=mirrored)
        assert levels_apart(found, decode(path, 10, decoder).flip(2)) <= 1
    assert shapes == [[3, 20, 40]] * 2


@pytest.mark.parametrize("keep", [0, 10, 300, 1000])
def test_damaged_jpeg_gives_the_same_error(keep: int, tmp_path: Path) -> None:
    path = picture(tmp_path / "x.jpg", (40, 30))
    path.write_bytes(path.read_bytes()[:keep])
    messages = []
    for decoder in DECODERS:
        with pytest.raises(DataError, match=f"{path} is not a valid image: .* Repair or remove it") as caught:
            decode(path, 8, decoder)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    with pytest.raises(DataError, match="There is no image"):
        decode(tmp_path / "y.jpg", 8, "simplejpeg")


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_check, "find_spec", lambda _: None)
    picture(tmp_path / "train/a/x.jpg")
    fix = r"data\.decoder=simplejpeg needs simplejpeg: pip install 'dist-train\[jpeg\]'\."
    with pytest.raises(ConfigError, match=fix):
        check_data_exists(DataConfig(name="image_folder", root=tmp_path, image_size=8, decoder="simplejpeg"))


# --- runs --------------------------------------------------------------------------------------------------------


def settings(root: Path, decoder: Decoder) -> dict[str, Any]:
    for number in range(8):
        picture(root / "train" / "ab"[number % 2] / f"{number}.jpg", (20, 12))
    data = {"name": "image_folder", "root": str(root), "image_size": 8, "decoder": decoder, "val_examples": 2}
    loading = {"resident": False, "num_workers": 2}
    model = {"name": "mlp", "args": {"hidden": 2}}
    return {"data": data | loading, "model": model, "global_batch_size": 2, "train_for": "2 epochs"}


def test_run_of_an_older_version_is_refused(tmp_path: Path) -> None:
    chosen, run = settings(tmp_path / "data", "pil"), tmp_path / "run"
    train_on_ranks(chosen, run, stop_after=3)
    recorded = read_json(run / "run.json")
    for fingerprint in recorded["data_identity"].values():
        del fingerprint["resized_by"]
    write_json(run / "run.json", recorded)
    with pytest.raises(AssertionError, match="The train set has pictures resized by torch, but the run began with"):
        train_on_ranks(chosen, run)
    assert status(run) == "INTERRUPT"


def test_run_keeps_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a resume, in `evaluate` and in `predict`."""
    chosen, run = settings(tmp_path / "data", "simplejpeg"), tmp_path / "run"
    train_on_ranks(chosen, run, stop_after=3)
    with pytest.raises(AssertionError, match=r"data\.decoder: simplejpeg in the run, pil now"):
        train_on_ranks(chosen | {"data": chosen["data"] | {"decoder": "pil"}}, run)
    assert status(run) == "INTERRUPT"
    train_on_ranks(chosen, run)
    assert read_json(run / "run.json")["versions"]["simplejpeg"] == simplejpeg.__version__

    evaluated = run_forked([*DIST_TRAIN, "evaluate", str(run), "--split", "val", "--json"], tmp_path)
    assert json.loads(evaluated.stdout)["seen"] == 2
    assert "not comparable" not in evaluated.stderr

    decoders = []

    def recorded(path: Path, image_size: int, decoder: Decoder, channels: int) -> Tensor:
        decoders.append(decoder)
        return decode(path, image_size, decoder, channels)

    monkeypatch.setattr(module, "decode", recorded)
    saved, paths = TrainedNet.open(run, "last"), [*(tmp_path / "data/train/a").iterdir()]
    assert len([*module.predict(saved, paths)]) == len(paths)
    assert decoders == ["simplejpeg"] * len(paths)
    monkeypatch.setattr(settings_check, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'dist-train\[jpeg\]'"):
        next(module.predict(saved, paths))
