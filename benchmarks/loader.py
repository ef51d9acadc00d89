"""Training batches for classification: ours, WebDataset with a DataLoader, and decoding alone.

All three see the same JPEGs in the same shards on local disk with the same number of threads or
worker processes, in turns. ours and peer: random-resized crop to 224, flip, batches of 32. floor:
decoding every picture whole, nothing else. Unit: images per second, from first to last batch.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import simplejpeg

from data_pipeline.config import TrainData
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.formats.synthetic import synthesize
from data_pipeline.loader import TrainLoader
from data_pipeline.prepare import prepare

BATCH, STEPS, CROP, PICTURES = 32, 40, 224, 768


def make_dataset(root: Path) -> Dataset:
    """Pictures of about 320 pixels a side."""
    counts = {"imagenet/train": PICTURES, "imagenet/val": 8}
    source = synthesize(root / "raw", layouts=["imagenet"], counts=counts, size=320)["imagenet"]
    prepare("imagenet", source, root / "drawn", workers=1)
    return open_dataset(root, "drawn", "train")


def ours(dataset: Dataset, threads: int) -> float:
    """Images per second of `TrainLoader`."""
    with TrainLoader(
        dataset=dataset,
        task="classification",
        data=TrainData(dataset="drawn", crop=CROP),
        seed=0,
        global_batch=BATCH,
        slots=range(BATCH),
        num_classes=len(dataset.manifest.class_names),
        stop_step=STEPS + 1,
        threads=threads,
    ) as loader:
        return _rate(lambda: [next(loader) for _ in range(STEPS)], lambda: next(loader))


def peer(dataset: Dataset, workers: int) -> float:
    """Images per second of WebDataset's pipeline in a DataLoader, decoding with Pillow."""
    import webdataset as wds
    from torchvision import transforms

    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(CROP),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    assert dataset.manifest.path is not None
    folder = dataset.manifest.path.parent
    urls = [str(folder / shard.name) for shard in dataset.manifest.shards]
    pipeline = (
        wds.WebDataset(urls, resampled=True, shardshuffle=False)
        .shuffle(256)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(augment, lambda label: label)
        .batched(BATCH)
    )
    batches = iter(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))
    return _rate(lambda: list(islice(batches, STEPS)), lambda: next(batches))


def floor(dataset: Dataset, threads: int) -> float:
    """Images per second of libjpeg-turbo on threads, from memory."""
    raw = [dataset.read(*dataset.locate(i)).image for i in range(dataset.num_samples)]
    pictures = [raw[i % len(raw)] for i in range(BATCH * STEPS)]
    with ThreadPoolExecutor(threads) as pool:
        return _rate(
            lambda: list(pool.map(simplejpeg.decode_jpeg, pictures)),
            lambda: list(pool.map(simplejpeg.decode_jpeg, pictures[:BATCH])),
        )


def _rate(run: Callable[[], object], warm_up: Callable[[], object]) -> float:
    warm_up()
    began = time.perf_counter()
    run()
    return BATCH * STEPS / (time.perf_counter() - began)


def measure(threads: int, repeats: int) -> dict[str, object]:
    """One row: medians over interleaved repeats, and the spread of the ratio to the peer."""
    with tempfile.TemporaryDirectory() as place:
        dataset = make_dataset(Path(place))
        rounds = [
            (ours(dataset, threads), peer(dataset, threads), floor(dataset, threads))
            for _ in range(repeats)
        ]
    mine, theirs, least = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = [round(a / b, 2) for a, b, _ in rounds]
    return {
        "benchmark": "loader",
        "case": f"classification, 320 px JPEG to {CROP}, {threads} threads or workers",
        "ours": round(mine),
        "peer": round(theirs),
        "peer_name": "webdataset + DataLoader + torchvision",
        "floor": round(least),
        "ratio_to_peer": round(mine / theirs, 2),
        "ratio_to_floor": round(mine / least, 2),
        "unit": "images/s",
        "spread": [min(ratios), max(ratios)],
    }


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    row = measure(arguments.threads, arguments.repeats)
    if arguments.json:
        print(json.dumps(row))
    else:
        print("\n".join(f"{key:16} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
