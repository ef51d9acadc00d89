"""Shows a survey: contact sheets of samples under their labels, and one page with all in it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.dataset import Dataset
from data_pipeline.decode import Pixels, decode_class, decode_image, decode_labels, decode_mask
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.mask_checks import has_background
from data_pipeline.palette import voc_palette
from data_pipeline.survey import SplitSurvey

_TILE = (240, 180)  # width, height in pixels
_CAPTION, _GAP, _COLUMNS = 30, 8, 6
_IGNORED = (255, 255, 255)
_MAX_ROWS = 1000  # classes in a table of the page
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1500px;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}
th{text-align:left;border-bottom:1px solid #888}td,th{padding:2px 12px 2px 0}
td.n{text-align:right;font-variant-numeric:tabular-nums}
i{display:inline-block;width:1em;height:1em;border:1px solid #999;vertical-align:-2px}
b.bar{display:inline-block;height:.8em;background:#4a7ebb}
figure{display:inline-block;margin:4px;vertical-align:top;width:240px;font-size:12px}
figcaption{overflow-wrap:anywhere}li{margin:.4em 0}.w{background:#fff6e0;padding:.6em 1.2em}
"""


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet and what is written under it."""

    picture: Pixels
    key: str
    text: str


def make_tile(dataset: Dataset, index: int) -> Tile:
    """Sample `index`, small, with its label: a mask in VOC's colours over it, else class names.

    Pixels with the ignore label are white; a sample that cannot be read is a grey tile.
    """
    key = f"sample {index}"
    try:
        raw = dataset.read(*dataset.locate(index))
        key = raw.key
        image = decode_image(raw.image, raw.key)
        manifest, ids = dataset.manifest, list[int]()
        if raw.label and manifest.task == "segmentation":
            mask = decode_mask(raw.label, raw.key)
            if mask.shape != image.shape[:2]:
                raise DataError("image and mask differ in size")
            ids = [i for i in np.unique(mask).tolist() if i != manifest.ignore_label]
            picture = _overlay(image, mask, dataset.manifest)
        else:
            picture = _shrink(image, cv2.INTER_AREA)
            if raw.label and manifest.task == "classification":
                ids = [decode_class(raw.label, raw.key)]
            elif raw.label:
                ids = decode_labels(raw.label, raw.key)
    except DataError as error:
        return Tile(np.full((_TILE[1], _TILE[0], 3), 128, np.uint8), key, f"broken: {error}")
    names = dict(enumerate(manifest.class_names))
    text = ", ".join(names.get(i, f"id {i}?") for i in ids) or "no label"
    return Tile(picture, key, text)


def _overlay(image: Pixels, mask: Pixels, manifest: Manifest) -> Pixels:
    colors = voc_palette()
    if manifest.ignore_label is not None:
        colors[manifest.ignore_label] = _IGNORED
    small, ids = _shrink(image, cv2.INTER_AREA), _shrink(mask, cv2.INTER_NEAREST)
    mixed = cv2.addWeighted(small, 0.45, colors[ids], 0.55, 0)
    if has_background(manifest.class_names):
        mixed[ids == 0] = small[ids == 0]
    return mixed


def _shrink(pixels: Pixels, method: int) -> Pixels:
    height, width = pixels.shape[:2]
    factor = min(_TILE[0] / width, _TILE[1] / height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(pixels, size, interpolation=method if factor < 1 else cv2.INTER_NEAREST)


def contact_sheet(tiles: Sequence[Tile]) -> bytes:
    """The tiles in rows of six, captions below, as a PNG."""
    columns = max(1, min(_COLUMNS, len(tiles)))
    rows = max(1, -(-len(tiles) // columns))
    cell = (_TILE[0] + _GAP, _TILE[1] + _CAPTION + _GAP)
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, tile in enumerate(tiles):
        left = _GAP + number % columns * cell[0]
        top = _GAP + number // columns * cell[1]
        height, width = tile.picture.shape[:2]
        at = (left + (_TILE[0] - width) // 2, top + (_TILE[1] - height) // 2)
        sheet.paste(Image.fromarray(tile.picture), at)
        for line, text in enumerate((tile.key, tile.text)):
            shown = _fit(text, font)
            draw.text((left, top + _TILE[1] + 1 + 14 * line), shown, fill="black", font=font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _fit(text: str, font: Any) -> str:
    """`text`, cut to the width of a tile."""
    if font.getlength(text) <= _TILE[0]:
        return text
    text = text[:80]
    while text and font.getlength(f"{text}...") > _TILE[0]:
        text = text[:-1]
    return f"{text}..."


def write_page(
    path: Path,
    title: str,
    splits: Sequence[SplitSurvey],
    tiles: Sequence[Sequence[Tile]],
    warnings: Sequence[str],
) -> None:
    """Write everything to one HTML file with the pictures in it, no script."""
    listed = "".join(f"<li>{escape(line)}</li>" for line in warnings) or "<li>none</li>"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>",
        f'<div class="w"><h2>Warnings</h2><ul>{listed}</ul></div>',
        *(_section(split, shown) for split, shown in zip(splits, tiles, strict=True)),
        "</html>",
    ]
    path.write_text("\n".join(parts), "utf-8")


def _section(split: SplitSurvey, tiles: Sequence[Tile]) -> str:
    figures = "".join(
        f'<figure><img alt="{escape(tile.key)}" src="{_data_uri(tile.picture)}">'
        f"<figcaption>{escape(tile.key)}: {escape(tile.text)}</figcaption></figure>"
        for tile in tiles
    )
    facts = "".join(f"<tr><td>{name}</td><td>{escape(value)}</td></tr>" for name, value in
                    summary(split))  # fmt: skip
    return (
        f"<h2>{escape(split.name)}</h2><table>{facts}</table>{_class_table(split)}<p>{figures}</p>"
    )


def summary(split: SplitSurvey) -> list[tuple[str, str]]:
    """Names and values of what describes a split in a few lines."""
    rows = [
        ("task", split.manifest.task),
        ("samples", f"{split.manifest.num_samples:,}"),
        ("looked at", f"{split.looked_at:,}"),
    ]
    sizes = split.size_quantiles()
    for side in ("height", "width"):
        if side in sizes:
            values = ", ".join(f"{at} {value}" for at, value in sizes[side].items())
            rows.append((f"{side} (quantiles)", values))
    if "largest" in sizes:
        rows.append(("largest", f"{sizes['largest']['width']} x {sizes['largest']['height']}"))
    if split.has_masks:
        rows.append(("ignored pixels", f"{split.ignored_share:.2%}"))
    rows += [("grey images", f"{split.grey:,}"), ("broken", f"{len(split.errors):,}")]
    rows.append(("images twice", f"{len(split.duplicates):,}"))
    return rows


def _class_table(split: SplitSurvey) -> str:
    colors, rows = voc_palette(), split.classes()
    shares = "pixel_share" if split.has_masks else "image_share"
    largest = max((row[shares] for row in rows), default=0) or 1
    heads = ["id", "class", "images", "share", *(("pixels", "share", "regions") * split.has_masks)]
    lines = ["<table><tr>", *(f"<th>{head}</th>" for head in heads), "<th></th></tr>"]
    for row in rows[:_MAX_ROWS]:
        red, green, blue = colors[row["id"] % 256]
        swatch = f'<i style="background:rgb({red},{green},{blue})"></i> ' * split.has_masks
        cells = [f"{row['id']}", f"{row['images']:,}", f"{row['image_share']:.2%}"]
        if split.has_masks:
            cells += [f"{row['pixels']:,}", f"{row['pixel_share']:.3%}", f"{row['regions']:,}"]
        bar = f'<b class="bar" style="width:{200 * row[shares] / largest:.0f}px"></b>'
        numbers = [f'<td class="n">{cell}</td>' for cell in cells]
        numbers.insert(1, f"<td>{swatch}{escape(row['name'])}</td>")
        lines.append(f"<tr>{''.join(numbers)}<td>{bar}</td></tr>")
    more = f"<p>and {len(rows) - _MAX_ROWS:,} more classes</p>" if len(rows) > _MAX_ROWS else ""
    return "".join(lines) + "</table>" + more


def _data_uri(picture: Pixels) -> str:
    encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"
