"""What `atrous predict` reads, writes, refuses and reports."""

import inspect
import io
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

from model.build import build_network
from model.config import ModelConfig
from model.deeplab import DeepLab
from model.inference import Inference
from orchestrator.cli import main as cli
from orchestrator.errors import CheckpointError, RunError
from orchestrator.networks import predict
from orchestrator.networks.images import find_images
from orchestrator.networks.network import open_network
from orchestrator.runs.checkpoint import save_checkpoint
from tests.unit.orchestrator.jobs import MODEL, SEGMENTER

CLASSES = ("background", "cat", "dog", "sofa")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("run"), "segmentation", SEGMENTER)


def save(directory: Path, task: Any, model: dict[str, Any]) -> str:
    """A checkpoint of random weights whose predictions differ from pixel to pixel."""
    torch.manual_seed(3)
    network = build_network(ModelConfig(**model), task, len(CLASSES))
    if isinstance(network, DeepLab):
        nn.init.normal_(network.logits.weight, std=0.5)
    network.train()
    with torch.no_grad():
        for _ in range(8):
            network(torch.randint(0, 256, (4, 3, 65, 65), dtype=torch.uint8))
    state = {
        "stage": "tiny",
        "task": task,
        "step": 7,
        "model": model,
        "class_names": CLASSES,
        "fingerprint": "f",
    }
    return str(save_checkpoint(directory, network.state_dict(), {}, state).path)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(seed))
    small = random.integers(0, 256, (2 + height // 20, 2 + width // 20, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height)))


def put(path: Path, height: int = 40, width: int = 60, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(height, width, seed)).save(path)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["predict", *(str(a) for a in arguments)])


def refused(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, RunError | CheckpointError)
    return str(result.exception)


def written(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


@pytest.mark.parametrize("size", [(1, 1), (37, 200), (64, 65), (40, 60)])
@pytest.mark.parametrize("fold", ["--fold", "--no-fold"])
def test_labels_overlay_and_probabilities(
    checkpoint: str, tmp_path: Path, size: tuple[int, int], fold: str
) -> None:
    source = put(tmp_path / "cat.png", *size)
    done = run(checkpoint, source, "--out", tmp_path / "out", "--probabilities", fold)
    assert done.exit_code == 0, done.output
    assert written(tmp_path / "out") == ["cat.npy", "cat.png", "cat_overlay.jpg"]
    with Image.open(tmp_path / "out/cat.png") as image:
        assert image.mode == "P"
        assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        labels = np.asarray(image)
    probabilities = np.load(tmp_path / "out/cat.npy")
    assert probabilities.dtype == np.float16
    assert probabilities.shape == (len(CLASSES), *size)
    network = open_network(checkpoint).network
    height, width = (16 * -(-(side - 1) // 16) + 1 for side in size)
    padded = torch.full((1, 3, height, width), 127.5)
    padded[0, :, : size[0], : size[1]] = torch.from_numpy(pixels(*size)).permute(2, 0, 1)
    with torch.no_grad():
        expected = network(padded).softmax(1)[0, :, : size[0], : size[1]].numpy()
    assert np.abs(probabilities - expected).max() < 2e-3
    sure = np.diff(np.sort(expected, axis=0)[-2:], axis=0)[0] > 1e-3
    assert np.array_equal(labels[sure], expected.argmax(0)[sure])
    with Image.open(tmp_path / "out/cat_overlay.jpg") as image:
        assert image.size == (size[1], size[0])


def test_batch_norm_is_folded_unless_not_wanted(checkpoint: str, tmp_path: Path) -> None:
    for fold in (True, False):
        settings = predict.Settings(inference=Inference(), out=tmp_path, fold=fold)
        modules = predict.open_predictor(checkpoint, settings).network.modules()
        assert any(isinstance(module, nn.BatchNorm2d) for module in modules) is not fold


def test_scales_flip_stride_and_tiles_reach_the_network(checkpoint: str, tmp_path: Path) -> None:
    put(tmp_path / "in/a.png", 40, 300)
    found = {}
    for name, options in {
        "plain": (),
        "scales": ("--scales", "0.5,1"),
        "flip": ("--flip",),
        "stride": ("--output-stride", "8"),
        "tiles": ("--tile", "129", "--overlap", "0"),
    }.items():
        out = tmp_path / name
        done = run(checkpoint, tmp_path / "in", "--out", out, "--probabilities", *options)
        assert done.exit_code == 0, done.output
        assert "1 images predicted" in done.output
        found[name] = np.load(out / "a.npy").tobytes()
    assert len(set(found.values())) == len(found)


def test_overlays_are_coloured_where_there_is_an_object() -> None:
    grey = np.full((3, 600, 3), 100, np.uint8)
    labels = np.zeros((3, 600), np.uint8)
    labels[:, 200:400], labels[:, 400:] = 1, 3
    predict.paint(grey, labels, CLASSES)
    assert grey[:, :200].reshape(-1, 3).tolist() == [[100, 100, 100]] * 600
    assert grey[2, 399].tolist() == [114, 50, 50]
    assert grey[0, 400].tolist() == [114, 114, 50]
    tall = np.full((600, 1, 3), 100, np.uint8)
    predict.paint(tall, np.ones((600, 1), np.uint8), ("road", "car"))
    assert (tall == [114, 50, 50]).all()
    predict.paint(tall, np.zeros((600, 1), np.uint8), ("road", "car"))
    assert (tall == [57, 25, 25]).all()


def test_the_palette_is_pascal_vocs() -> None:
    palette = predict.voc_palette()
    assert palette.shape == (256, 3)
    assert palette[[0, 1, 2, 8, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [64, 0, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]
    assert len({tuple(colour) for colour in palette.tolist()}) == 256


def test_directories_patterns_and_names(checkpoint: str, tmp_path: Path) -> None:
    for name in ("in/a.png", "in/x/a.png", "in/x/b.JPG", "in/.hidden/c.png", "in/x/.d.png"):
        put(tmp_path / name)
    (tmp_path / "in/notes.txt").write_text("no image")
    out = tmp_path / "out"
    assert run(checkpoint, tmp_path / "in", "--out", out, "--no-overlay").exit_code == 0
    assert written(out) == ["a.png", "x/a.png", "x/b.png"]
    names = {str(i.name) for i in find_images([f"{tmp_path}/in/**/*.png"])}
    assert names == {"a", "x/a"}
    assert [str(i.name) for i in find_images([f"{tmp_path}/in/x/b.*"])] == ["b"]
    assert [str(i.name) for i in find_images([f"{tmp_path}/i*/x"])] == ["in/x/a", "in/x/b"]
    literal = put(tmp_path / "in/[1].png")
    assert [str(i.name) for i in find_images([str(literal)])] == ["[1]"]
    assert [str(i.name) for i in find_images([str(literal), str(literal)])] == ["[1]"]


def test_outputs_that_collide_are_refused_before_anything_is_computed(
    checkpoint: str, tmp_path: Path
) -> None:
    first, second = put(tmp_path / "x/a.png"), put(tmp_path / "y/a.jpg")
    out = tmp_path / "out"
    message = refused("no-checkpoint", first, second, "--out", out)
    assert "x/a.png and" in message
    assert "y/a.jpg would both be written to" in message
    assert not out.exists()
    assert "would be overwritten" in refused(checkpoint, first, "--out", tmp_path / "x")
    assert "lies in" in refused(checkpoint, tmp_path / "x", "--out", tmp_path / "x/out")
    other = put(tmp_path / "x/a_overlay.png")
    assert "would both be written" in refused(checkpoint, first, other, "--out", out)


def test_a_broken_image_is_named_and_the_rest_goes_on(checkpoint: str, tmp_path: Path) -> None:
    for name in ("a", "c"):
        put(tmp_path / f"in/{name}.png")
    (tmp_path / "in/b.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:200])
    (tmp_path / "in/b2.jpg").write_text("not an image")
    out = tmp_path / "out"
    done = run(checkpoint, tmp_path / "in", "--out", out)
    assert done.exit_code == 1
    assert written(out) == ["a.png", "a_overlay.jpg", "c.png", "c_overlay.jpg"]
    assert "2 images predicted" in done.stdout
    assert "2 images failed" in done.stderr
    assert f"{tmp_path}/in/b.png: cannot decode it (damaged PNG)" in done.stderr
    assert f"{tmp_path}/in/b2.jpg: cannot decode it (not an image" in done.stderr
    assert "prepare" not in done.stderr


def test_what_cannot_be_written_is_named_and_leaves_nothing_half(
    checkpoint: str, tmp_path: Path
) -> None:
    put(tmp_path / "in/a.png")
    put(tmp_path / "in/b.png")
    (tmp_path / "out/a.png").mkdir(parents=True)
    done = run(checkpoint, tmp_path / "in", "--out", tmp_path / "out", "--no-overlay")
    assert done.exit_code == 1
    assert "in/a.png: " in done.stderr
    assert written(tmp_path / "out") == ["b.png"]


@pytest.mark.parametrize("mode", ["L", "LA", "CMYK", "P", "1", "I;16"])
def test_images_of_other_kinds(checkpoint: str, tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    kind = Image.fromarray(pixels(40, 60)).convert("I" if mode == "I;16" else mode)
    (kind.convert("I;16") if mode == "I;16" else kind).save(tmp_path / f"a.{suffix}")
    done = run(checkpoint, tmp_path / f"a.{suffix}", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out/a.png") as labels:
        assert labels.size == (60, 40)


def test_what_cannot_be_predicted(checkpoint: str, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "no image there" in refused(checkpoint, tmp_path / "empty", *out)
    assert "no image there" in refused(checkpoint, tmp_path / "empty/*.jpg", *out)
    assert "no such file" in refused(checkpoint, tmp_path / "nowhere.jpg", *out)
    assert "only paths and s3://" in refused(checkpoint, "https://host/a.jpg", *out)
    image = put(tmp_path / "a.png")
    assert "choose cpu, cuda" in refused(checkpoint, image, *out, "--device", "tpu")
    assert "torch sees" in refused(checkpoint, image, *out, "--device", "cuda:99")
    assert "output_stride is 5" in refused(checkpoint, image, *out, "--output-stride", "5")
    classifier = save(tmp_path / "run", "classification", MODEL)
    assert "is a classification network" in refused(classifier, image, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scales", "0.5,big"), "could not convert"),
        (("--scales", "0.6"), "multiples of 0.25"),
        (("--tile", "1000"), "take 1025"),
        (("--overlap", "100"), "multiple of 256"),
    ],
)
def test_options_that_do_not_fit(
    options: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = run("checkpoint", "a.png", "--out", "out", *options)
    assert done.exit_code == 2
    assert message in done.stderr


OBJECTS = {
    "photos/": b"",
    "photos/a.png": b"",
    "photos/deep/b.jpg": b"",
    "photos/notes.txt": b"no image",
    "other/c.png": b"",
}


class Bucket(BaseHTTPRequestHandler):
    """An object store of one bucket that lists two keys a page."""

    objects: dict[str, bytes]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        key = url.path.removeprefix("/bucket").lstrip("/")
        status, body = 200, self.objects.get(key, b"")
        if "list-type" in query:
            body = self._page(query)
        elif key not in self.objects:
            status = 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _page(self, query: dict[str, list[str]]) -> bytes:
        keys = sorted(k for k in self.objects if k.startswith(query.get("prefix", [""])[0]))
        start = int(query.get("continuation-token", ["0"])[0])
        items = "".join(f"<Contents><Key>{k}</Key></Contents>" for k in keys[start : start + 2])
        more = start + 2 < len(keys)
        token = f"<NextContinuationToken>{start + 2}</NextContinuationToken>" if more else ""
        truncated = f"<IsTruncated>{str(more).lower()}</IsTruncated>"
        return f"<ListBucketResult>{truncated}{token}{items}</ListBucketResult>".encode()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The objects of s3://bucket."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    objects = dict(OBJECTS)
    for seed, key in enumerate(k for k in objects if k.endswith(("png", "jpg"))):
        stream = io.BytesIO()
        Image.fromarray(pixels(33, 33, seed)).save(stream, "PNG")
        objects[key] = stream.getvalue()
    handler = type("Handler", (Bucket,), {"objects": objects})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield objects
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_prefix_in_an_object_store(
    checkpoint: str, tmp_path: Path, bucket: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    done = run(checkpoint, "s3://bucket/photos/", "--out", out, "--no-overlay")
    assert done.exit_code == 0, done.output
    assert written(out) == ["a.png", "deep/b.png"]
    assert [i.place for i in find_images(["s3://bucket/photos/notes.txt"])] == [
        "s3://bucket/photos/notes.txt"
    ]
    assert [str(i.name) for i in find_images(["s3://bucket"])] == [
        "other/c",
        "photos/a",
        "photos/deep/b",
    ]
    (image,) = find_images(["s3://bucket/photos/a.png"])
    assert image.read() == bucket["photos/a.png"]
    assert "no image there" in refused(checkpoint, "s3://bucket/nothing", "--out", out)


def test_an_object_that_is_gone_is_a_failure_of_its_own(
    checkpoint: str, tmp_path: Path, bucket: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = find_images(["s3://bucket/photos/"])
    del bucket["photos/a.png"]
    monkeypatch.setattr(predict, "find_images", lambda places: images)
    done = run(checkpoint, "s3://bucket/photos/", "--out", tmp_path / "out", "--no-overlay")
    assert done.exit_code == 1
    assert "s3://bucket/photos/a.png: cannot read the object" in done.stderr
    assert written(tmp_path / "out") == ["deep/b.png"]


def test_keys_cannot_leave_the_output_directory(bucket: dict[str, bytes]) -> None:
    bucket["top/../../b.png"] = b""
    bucket["top//b.png"] = b""
    bucket["top//etc/b.png"] = b""
    assert {str(i.name) for i in find_images(["s3://bucket/top/"])} == {"b", "etc/b"}


def test_an_object_store_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(RunError, match="s3://bucket/photos/: cannot list it"):
        find_images(["s3://bucket/photos/"])


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", "nowhere", str(put(tmp_path / "a.png")), "--out", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", ["atrous", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert f"{Path('nowhere').absolute()}: no valid checkpoint" in capsys.readouterr().err


def test_the_defaults_of_the_command_line_are_those_of_inference() -> None:
    options = inspect.signature(cli.predict).parameters
    how = Inference()
    assert (options["tile"].default, options["overlap"].default) == (how.tile, how.overlap)
