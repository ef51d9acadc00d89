"""The S3 case of `benchmarks.loader`: a server, a proxy that adds latency, and its readers."""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.clock import clock
from benchmarks.loader_data import SAMPLES_PER_SHARD, Case
from benchmarks.loader_peers import Round, train_loader, web_loader
from data_pipeline.config import Cache
from data_pipeline.dataset import open_dataset

BUCKET = "shards"
_HOURS = 3600 * 6


@contextmanager
def latent_store(case: Case, latency: float) -> Iterator[str | None]:
    """Where the shards of a case lie in a store that is slow to answer; None without SeaweedFS."""
    if not (shutil.which("weed") or shutil.which("weed", path=Path(sys.executable).parent)):
        yield None
        return
    from tests.object_store import ACCESS_KEY, SECRET_KEY, object_store

    with object_store() as server:
        server.client.create_bucket(Bucket=BUCKET)
        folder = case.root / case.task / "train"
        for path in sorted(folder.iterdir()):
            server.client.upload_file(str(path), BUCKET, f"{case.task}/train/{path.name}")
        context = multiprocessing.get_context("spawn")
        pipe, end = context.Pipe()
        proxy = context.Process(target=_serve, args=(end, server.port, latency), daemon=True)
        proxy.start()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{pipe.recv()}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            yield f"s3://{BUCKET}"
        finally:
            proxy.terminate()
            proxy.join()


def _serve(pipe: Connection, port: int, latency: float) -> None:
    from tests.object_store import Proxy

    proxy = Proxy(port)
    proxy.latency = latency
    pipe.send(proxy.port)
    while True:
        time.sleep(60)


def our_epoch(case: Case) -> Round:
    """Opening the data set and its first epoch, with an empty cache."""

    def run() -> tuple[int, float, float]:
        with tempfile.TemporaryDirectory() as directory, clock() as spent:
            cache = Cache(directory=directory)
            dataset = open_dataset(case.url, case.task, "train", cache)
            steps = dataset.num_samples // case.batch
            with train_loader(case, steps, dataset=dataset, block_size=SAMPLES_PER_SHARD) as loader:
                samples = sum(len(batch.keys) for batch in loader)
        return samples, spent.wall, spent.cpu

    return run


def web_epoch(case: Case) -> Round:
    """Its pipeline over presigned URLs, each worker a part of the shards."""
    import boto3

    client = boto3.client("s3")
    urls = []
    for path in case.shards:
        target = {"Bucket": BUCKET, "Key": f"{case.task}/train/{Path(path).name}"}
        urls.append(client.generate_presigned_url("get_object", target, _HOURS))

    def run() -> tuple[int, float, float]:
        with clock() as spent:
            samples = sum(len(batch[0]) for batch in web_loader(case, urls))
        return samples, spent.wall, spent.cpu

    return run
