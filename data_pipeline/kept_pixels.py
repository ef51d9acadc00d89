"""Decoded images in the node's cache: from the second epoch on, training reads pixels instead."""

import logging
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from zlib_ng import zlib_ng

from data_pipeline.config import Cache
from data_pipeline.dataset import Dataset, RawSample, node_cache
from data_pipeline.decode import Pixels, decode_image
from data_pipeline.node_cache import NodeCache

log = logging.getLogger(__name__)

_CHECKSUM = 4  # bytes before the pixels
# Another decoder may round otherwise; its pixels are others.
_DECODERS = f"simplejpeg {simplejpeg.__version__} opencv {cv2.__version__}"


class KeptPixels:
    """Images by sample, decoded once on a node; safe to share between threads."""

    def __init__(self, cache: NodeCache) -> None:
        self._cache = cache

    def image(self, raw: RawSample) -> Pixels:
        """The image of a sample, RGB `(H, W, 3)`, not to be written to.

        Raises:
            DataError: as `decode_image`, which is asked where the cache has nothing whole.
        """
        key = f"{raw.place} {_DECODERS}"
        data = self._cache.get(key, lambda: _sealed(decode_image(raw.image, raw.key)), bool)
        if not _is_whole(data, raw):
            self._cache.discard(key)
            return decode_image(raw.image, raw.key)
        return np.frombuffer(data, np.uint8, offset=_CHECKSUM).reshape(raw.height, raw.width, 3)


def keep_pixels(dataset: Dataset, cache: Cache | Literal[False] | None) -> KeptPixels | None:
    """What keeps the images of a split, `cache` as in a job file.

    None, with a warning, where they do not all fit: the last ones would push out the first, and
    every epoch would write all of them again.
    """
    place = node_cache(cache or None)
    if place is None:
        return None
    needed = dataset.num_pixels() * 3 + dataset.num_samples * _CHECKSUM
    if cache or dataset.remote:  # what is read from the shards is kept there too
        needed += sum(shard.size for shard in dataset.manifest.shards)
    if needed > place.room:
        log.warning(
            "data.keep_pixels: the images of %s would take %.3g GB of the cache %s, which keeps "
            "%.3g GB; each is decoded in every epoch: raise data.cache.size, or set "
            "data.cache.directory or ATROUS_CACHE to a larger disk",
            dataset.place,
            needed / 1e9,
            place.directory,
            place.room / 1e9,
        )
        return None
    log.info(
        "keeps decoded images of %s in %s, %.3g GB", dataset.place, place.directory, needed / 1e9
    )
    return KeptPixels(place)


def _sealed(image: Pixels) -> bytes:
    pixels = image.tobytes()
    return zlib_ng.crc32(pixels).to_bytes(_CHECKSUM, "big") + pixels


def _is_whole(data: bytes, raw: RawSample) -> bool:
    pixels = memoryview(data)[_CHECKSUM:]
    return (
        len(pixels) == raw.height * raw.width * 3
        and zlib_ng.crc32(pixels).to_bytes(_CHECKSUM, "big") == data[:_CHECKSUM]
    )
