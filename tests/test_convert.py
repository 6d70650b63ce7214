"""convert: sections in files become an OME-Zarr that independent readers agree on, or one message, nothing touched."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import tifffile
import zarr
from conftest import texture, tree
from ome_zarr_models.v05.image import Image as NgffImage
from PIL import Image

from pipeline.base.errors import SourceError, TargetError, UserError
from pipeline.convert import convert, main
from pipeline.storage.conversion.section_files import natural_key, open_stack

NM = ("--voxel-size-nm", "45", "4", "4")
SMALL = texture((5, 40, 48))


def by_tensorstore(path: Path) -> np.ndarray:
    """Every voxel, and an error where a chunk is not stored."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/0/"}, "fill_missing_data_reads": False}
    return np.asarray(ts.open(spec).result().read().result())


def folder_of(path: Path, volume: np.ndarray, names: list[str] | None = None) -> Path:
    path.mkdir()
    for section, name in zip(volume, names or [f"s{z:02d}.tif" for z in range(len(volume))], strict=True):
        if name.endswith(".png"):
            Image.fromarray(section).save(path / name)
        else:
            tifffile.imwrite(path / name, section)
    return path


def multi_page(path: Path, volume: np.ndarray, **options: object) -> Path:
    tifffile.imwrite(path, volume, photometric="minisblack", **options)
    return path


def separate_pages(path: Path, volume: np.ndarray) -> Path:
    with tifffile.TiffWriter(path) as file:
        for section in volume:
            file.write(section, compression="zlib", contiguous=False)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(
    "write",
    [
        lambda p, v: multi_page(p / "s.tif", v),
        lambda p, v: multi_page(p / "s.tif", v, compression="lzw"),
        lambda p, v: multi_page(p / "s.tif", v, compression="zlib", predictor=True),
        lambda p, v: multi_page(p / "s.tif", v, compression="zstd", tile=(16, 16)),
        lambda p, v: multi_page(p / "s.tif", v, byteorder=">"),
        lambda p, v: multi_page(p / "s.tif", v, bigtiff=True, metadata=None),
        lambda p, v: multi_page(p / "s.tif", v, imagej=True, metadata={"axes": "ZYX"}),
        lambda p, v: multi_page(p / "s.ome.tif", v, metadata={"axes": "ZYX"}),
        lambda p, v: separate_pages(p / "s.TIFF", v),
        lambda p, v: folder_of(p / "stack", v),
        lambda p, v: folder_of(p / "stack", v, [f"{z}.png" for z in range(len(v))]),
    ],
    ids=["plain", "lzw", "predictor", "tiled", "big-endian", "bigtiff", "imagej", "ome", "pages", "folder", "png"],
)
def test_grey_values_survive_every_container(
    tmp_path: Path, write: Callable[[Path, np.ndarray], Path], dtype: str
) -> None:
    volume = SMALL.astype(dtype) * (1 if dtype == "uint8" else 257)
    source, target = write(tmp_path, volume), tmp_path / "out.zarr"
    assert main([str(source), str(target), *NM, "--chunk", "2", "16", "16"]) == 0
    found = by_tensorstore(target)
    assert found.dtype == dtype
    assert np.array_equal(found, volume)
    assert np.array_equal(zarr.open_group(target, mode="r")["0"][:], volume)


@pytest.mark.parametrize("name", ["drosophila-vnc-stack1", "flyem-medulla-labelled-z40"])
def test_real_stack_read_back_by_independent_readers(tmp_path: Path, shared_data: Path, name: str) -> None:
    raw = shared_data / name / "raw.tif"
    assert main([str(raw), str(tmp_path / "out.zarr"), *NM]) == 0
    truth = tifffile.imread(raw)
    assert np.array_equal(by_tensorstore(tmp_path / "out.zarr"), truth)
    assert np.array_equal(zarr.open_group(tmp_path / "out.zarr", mode="r")["0"][:], truth)


def test_layout_and_metadata(tmp_path: Path) -> None:
    convert(texture((10, 70, 90)), tmp_path / "out.zarr", (45, 4, 4.6), chunk=(4, 32, 32), attributes={"more": 1})
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    array = group["0"]
    assert (array.chunks, array.shards, array.metadata.dimension_names) == ((4, 32, 32), (4, 96, 96), ("z", "y", "x"))
    blosc = array.compressors[0].to_dict()["configuration"]
    assert (blosc["cname"], blosc["clevel"], blosc["shuffle"], blosc["typesize"]) == ("zstd", 1, "bitshuffle", 1)
    assert group.attrs["more"] == 1
    image = NgffImage.from_zarr(group)
    (multiscale,) = image.attributes.ome.multiscales
    assert [(a.name, a.unit) for a in multiscale.axes] == [(n, "nanometer") for n in "zyx"]
    scale, translation = multiscale.datasets[0].coordinateTransformations
    assert (scale.scale, translation.translation) == ([45, 4, 4.6], [22.5, 2, 2.3])


def test_black_voxels_are_stored_not_left_out(tmp_path: Path) -> None:
    black = np.zeros((4, 64, 64), np.uint8)
    convert(black, tmp_path / "out.zarr", (1, 1, 1), chunk=(2, 32, 32))
    assert np.array_equal(by_tensorstore(tmp_path / "out.zarr"), black)
    assert len([f for f in tree(tmp_path / "out.zarr") if "/c/" in f]) == 2


def test_a_layer_at_a_time(tmp_path: Path) -> None:
    """Memory: when section z is asked for, all layers before its own are on disk."""
    heard: list[int] = []
    asked: list[tuple[int, int]] = []
    stack = open_stack(folder_of(tmp_path / "stack", texture((7, 16, 16))))
    noted = type(stack)(
        stack.shape,
        stack.dtype,
        stack.names,
        lambda z: (asked.append((z, heard[-1] if heard else 0)), stack.read(z))[1],
    )
    convert(noted, tmp_path / "out.zarr", (1, 1, 1), chunk=(3, 16, 16), on_sections=heard.append)
    assert heard == [3, 6, 7]
    assert sorted(asked) == [(z, z // 3 * 3) for z in range(7)]


def test_natural_order_is_used_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["s10.tif", "s2.tif", "s1.tif", "s9.tif", "s3.tif"]
    source = folder_of(tmp_path / "stack", SMALL, names)
    (source / "notes.txt").write_text("x")
    (source / "._s1.tif").write_text("x")
    assert main([str(source), str(tmp_path / "out.zarr"), *NM]) == 0
    assert np.array_equal(by_tensorstore(tmp_path / "out.zarr"), SMALL[[2, 1, 4, 3, 0]])
    told = capsys.readouterr().err
    assert "s1.tif, s2.tif, s3.tif, s9.tif, s10.tif" in told
    assert "1 other files" in told
    assert "file numbers 4-8 are not there" in told
    assert sorted(["a010", "a9", "a09", "A1b2", "a1b10"], key=natural_key) == ["A1b2", "a1b10", "a09", "a9", "a010"]


def colour_png(path: Path) -> Path:
    folder_of(path / "s", SMALL, [f"{z}.png" for z in range(5)])
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(path / "s" / "3.png")
    return path / "s"


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def odd_one(path: Path, section: np.ndarray) -> Path:
    folder_of(path / "s", SMALL)
    tifffile.imwrite(path / "s" / "s03.tif", section)
    return path / "s"


def hole(path: Path) -> Path:
    """A TIFF whose third page has a strip of no bytes: tifffile reads it as zeros."""
    separate_pages(path, SMALL)
    with tifffile.TiffFile(path) as file:
        where = file.pages[2].tags["StripByteCounts"].valueoffset
    data = bytearray(path.read_bytes())
    data[where : where + 4] = bytes(4)
    path.write_bytes(data)
    return path


def two_dimensional(path: Path, **options: object) -> Path:
    tifffile.imwrite(path, SMALL[0], **options)
    return path


def rgb_stack(path: Path) -> Path:
    tifffile.imwrite(path, np.zeros((4, 20, 20, 3), np.uint8), photometric="rgb")
    return path


def mixed_kinds(path: Path) -> Path:
    return folder_of(path / "s", SMALL[:2], ["1.tif", "2.png"])


def junk(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (lambda p: p / "none.tif", "is not there"),
    "empty folder": (lambda p: folder_of(p / "s", SMALL[:0]), "holds no sections"),
    "one png": (lambda p: folder_of(p / "s", SMALL[:1], ["a.png"]) / "a.png", "a single PNG image"),
    "other file": (lambda p: junk(p / "a.mrc", b"x"), "not a TIFF file by its name"),
    "mixed kinds": (mixed_kinds, "both TIFF and PNG"),
    "mixed shapes": (lambda p: odd_one(p, SMALL[0, :30]), "s03.tif is 30 x 48 uint8, s00.tif is 40 x 48 uint8"),
    "mixed types": (lambda p: odd_one(p, SMALL[0].astype("uint16")), "s03.tif is 40 x 48 uint16"),
    "stack in folder": (lambda p: odd_one(p, SMALL), "holds 5 sections"),
    "mixed pages": (lambda p: separate_pages(p / "a.tif", [SMALL[0], SMALL[1, :30]]), "page 1 is 30 x 48 uint8"),
    "float": (lambda p: multi_page(p / "a.tif", SMALL.astype("float32")), "holds float32"),
    "signed": (lambda p: multi_page(p / "a.tif", SMALL.astype("int16")), "holds int16"),
    "one bit": (lambda p: multi_page(p / "a.tif", SMALL > 99), "holds bool"),
    "rgb": (lambda p: rgb_stack(p / "a.tif"), "colour images (rgb)"),
    "palette": (
        lambda p: two_dimensional(p / "a.tif", photometric="palette", colormap=np.zeros((3, 256), "u2")),
        "colour images (palette)",
    ),
    "inverted": (lambda p: two_dimensional(p / "a.tif", photometric="miniswhite"), "white as 0"),
    "channels": (lambda p: multi_page(p / "a.tif", SMALL, imagej=True, metadata={"axes": "CYX"}), "5 channels"),
    "colour png": (colour_png, "3.png holds RGB colour"),
    "not a tiff": (lambda p: junk(p / "a.tif", b"hello" * 9), "cannot be read (not a TIFF file"),
    "empty tiff": (lambda p: junk(p / "a.tif", b""), "cannot be read"),
    "cut tiff": (lambda p: cut(multi_page(p / "a.tif", SMALL), 0.6), "a.tif"),
    "cut lzw": (lambda p: cut(multi_page(p / "a.tif", SMALL, compression="lzw"), 0.6), "cut off"),
    "cut imagej": (
        lambda p: cut(multi_page(p / "a.tif", SMALL, imagej=True, metadata={"axes": "ZYX"}), 0.6),
        "cut off",
    ),
    "cut pages": (lambda p: cut(separate_pages(p / "a.tif", SMALL), 0.6), "a.tif"),
    "cut tiles": (lambda p: cut(two_dimensional(p / "a.tif", tile=(16, 16)), 0.9), "cut off"),
    "hole": (lambda p: hole(p / "a.tif"), "hole in page 2"),
    "no png": (
        lambda p: junk(folder_of(p / "s", SMALL, [f"{z}.png" for z in range(5)]) / "2.png", b"x").parent,
        "2.png cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_refused_by_name_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, message = BAD[name]
    source = make(tmp_path)
    assert main([str(source), str(tmp_path / "out.zarr"), *NM]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("where", [0.4, 0.95])
def test_a_section_that_does_not_decode_is_named_and_leaves_no_volume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: float
) -> None:
    source = folder_of(tmp_path / "s", SMALL, [f"{z}.png" for z in range(5)])
    cut(source / "3.png", where)
    command = [str(source), str(tmp_path / "out.zarr"), *NM, "--chunk", "2", "16", "16"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "3.png cannot be read" in told
    assert "unfinished" in told
    with pytest.raises(FileNotFoundError):
        zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert main(command) == 2
    assert "did not finish" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out.zarr")
    Image.fromarray(SMALL[3]).save(source / "3.png")
    assert main(command) == 0
    assert np.array_equal(by_tensorstore(tmp_path / "out.zarr"), SMALL)


def test_an_existing_target_is_refused_untouched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = multi_page(tmp_path / "a.tif", SMALL)
    target = tmp_path / "out.zarr"
    assert main([str(source), str(target), *NM]) == 0
    before = tree(target)
    assert main([str(source), str(target), *NM]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert tree(target) == before
    assert main([str(source), str(source), *NM]) == 2
    assert "is a file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(source), str(tmp_path / "empty"), *NM]) == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "no voxel size"),
        (("--voxel-size-nm", "45", "4", "0"), "three positive numbers"),
        (("--voxel-size-nm", "45", "4", "nan"), "three positive numbers"),
        (("--voxel-size-nm", "45", "4"), "expected 3 arguments"),
        ((*NM, "--chunk", "0", "4", "4"), "at least 1"),
        ((*NM, "--chunk", "a", "4", "4"), "invalid int"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], message: str) -> None:
    source = multi_page(tmp_path / "a.tif", SMALL)
    assert main([str(source), str(tmp_path / "out.zarr"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.zarr").exists()


def test_from_python(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names a format"):
        convert(SMALL, f"precomputed://file://{tmp_path}/out", (1, 1, 1))
    with pytest.raises(TargetError, match="cannot be written"):
        convert(SMALL, "https://example.org/out", (1, 1, 1))
    with pytest.raises(SourceError, match="shape"):
        convert(SMALL[0], tmp_path / "out", (1, 1, 1))
    with pytest.raises(SourceError, match="float64"):
        convert(SMALL.astype(float), tmp_path / "out", (1, 1, 1))
    assert convert(SMALL, f"file://{tmp_path}/out", (1, 1, 1)).shape.z == 5
    assert convert(multi_page(tmp_path / "a.tif", SMALL[:1]), tmp_path / "one", (1, 1, 1)).shape.z == 1


def test_to_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        client = pytest.importorskip("boto3").client(
            "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1"
        )
        client.create_bucket(Bucket="stacks")
        convert(SMALL, "s3://stacks/em", (45, 4, 4), chunk=(2, 32, 32))
        for item in client.list_objects_v2(Bucket="stacks")["Contents"]:
            file = tmp_path / item["Key"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(client.get_object(Bucket="stacks", Key=item["Key"])["Body"].read())
        assert np.array_equal(zarr.open_group(tmp_path / "em", mode="r")["0"][:], SMALL)
        with pytest.raises(TargetError, match="not empty"):
            convert(SMALL, "s3://stacks/em", (45, 4, 4))
    finally:
        server.stop()


def test_a_files_name_is_no_damage(tmp_path: Path) -> None:
    """tifffile's log quotes it, here with the complaint that the OME header is no XML, which sections do not need."""
    volume = multi_page(
        tmp_path / "incomplete, failed to corrupt.tif", SMALL, description="<OME><Im</OME>", metadata=None
    )
    assert np.array_equal(open_stack(volume).read(1), SMALL[1])


def test_a_disk_that_takes_no_more_and_the_same_command_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of file sizes stands for a full disk. What the message says to do works: delete, then convert again."""
    noise = np.random.default_rng(1).integers(0, 256, (8, 256, 256), np.uint8)
    command = [str(multi_page(tmp_path / "s.tif", noise)), str(tmp_path / "v.zarr"), "--voxel-size-nm", "45", "4", "4"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert "`ulimit -f` allows 100,000 bytes" in said
    assert f"delete file://{tmp_path / 'v.zarr'}" in said
    shutil.rmtree(tmp_path / "v.zarr")
    assert main(command) == 0
