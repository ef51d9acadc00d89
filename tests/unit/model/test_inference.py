"""The reference's averaging, written out again here, and tiles against whole images."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.config import DecoderConfig, ModelConfig
from model.deeplab import DeepLab
from model.inference import (
    Inference,
    aligned_side,
    infer,
    make_views,
    pad_image,
    predict_labels,
    predict_probabilities,
)

MEAN = torch.tensor([127.5, 127.5, 127.5])


@cache
def build(output_stride=16, **changes):
    """A small network whose batch normalisation has statistics that fit, so that pixels differ."""
    torch.manual_seed(0)
    config = {
        "backbone": "xception41",
        "width": 0.0625,
        "middle_units": 1,
        "aspp_channels": 8,
        "decoder": DecoderConfig(low_level_channels=8, channels=8),
        "batch_norm": {"momentum": 0.3},
        "output_stride": output_stride,
    }
    network = DeepLab(ModelConfig(**config | changes), num_classes=5)
    nn.init.normal_(network.logits.weight, std=0.5)
    network.train()
    noise = F.interpolate(torch.rand(4, 3, 9, 9) * 255, size=(65, 65), mode="bilinear")
    with torch.no_grad():
        for _ in range(15):
            network(noise)
    return network.eval()


def picture(height, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 3 + height // 16, 3 + width // 16, generator=generator) * 255
    return F.interpolate(coarse, size=(height, width), mode="bilinear")[0].to(torch.uint8)


def reference_probabilities(network, images, scales, flip):
    """predict_labels_multi_scale of the reference, in plain loops."""
    height, width = images.shape[2:]
    stride = 4 if network.decoder is not None else network.output_stride
    found = []
    for scale in scales:
        for flipped in (False, True) if flip else (False,):
            seen = images.flip(3) if flipped else images
            side = (int((height - 1) * scale + 1), int((width - 1) * scale + 1))
            seen = F.interpolate(seen, size=side, mode="bilinear", align_corners=True)
            logits = network.forward_low_resolution(seen)
            joined = tuple(int((n - 1) * max(1.0, scale) / stride + 1) for n in (height, width))
            logits = F.interpolate(logits, size=joined, mode="bilinear", align_corners=True)
            logits = logits.flip(3) if flipped else logits
            logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=True)
            found.append(logits.softmax(dim=1))
    return torch.stack(found).mean(dim=0)


@pytest.mark.parametrize("decoder", [DecoderConfig(low_level_channels=8, channels=8), None])
@pytest.mark.parametrize(
    ("scales", "flip"),
    [((1.0,), False), ((1.0,), True), ((0.5,), False), ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), True)],
)
def test_averages_are_the_references(decoder, scales, flip):
    network = build(decoder=decoder)
    images = torch.stack([picture(65, 129, seed).float() for seed in (1, 2)])
    views = make_views(scales, flip)
    with torch.no_grad():
        expected = reference_probabilities(network, images, scales, flip)
    assert expected.std(dim=(2, 3)).max() > 0.01
    found = predict_probabilities(network, images, views)
    assert torch.allclose(found, expected, atol=2e-6)
    sure = expected.topk(2, dim=1).values.diff(dim=1).abs()[:, 0] > 1e-5
    labels = predict_labels(network, images, views)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels[sure], expected.argmax(dim=1).to(torch.uint8)[sure])


@pytest.mark.parametrize("size", [(65, 65), (1, 1), (34, 50), (37, 200)])
def test_one_view_is_the_networks_own_output(size):
    network, images = build(), picture(*size)[None].float()
    with torch.no_grad():
        logits = network(images)
    views = make_views((1.0,), False)
    assert torch.allclose(predict_probabilities(network, images, views), logits.softmax(1))
    assert torch.equal(predict_labels(network, images, views), logits.argmax(1).to(torch.uint8))


def test_the_input_is_left_as_it_was():
    network, images = build(), picture(65, 65)[None].float()
    before = images.clone()
    predict_probabilities(network, images, make_views((0.5, 1.0), True))
    assert torch.equal(images, before)


def test_padding_is_zero_for_the_network():
    image = torch.full((3, 5, 4), 200, dtype=torch.uint8)
    padded = pad_image(image, (9, 17), MEAN)
    assert padded.shape == (3, 9, 17)
    assert (padded[:, :5, :4] == 200).all()
    assert (padded[:, 5:] == 127.5).all()
    assert (padded[:, :, 4:] == 127.5).all()


@pytest.mark.parametrize(
    ("output_stride", "scales", "sides"),
    [
        (16, (1.0,), {1: 1, 2: 17, 17: 17, 500: 513, 513: 513}),
        (8, (1.0,), {18: 33}),
        (32, (1.0,), {18: 33, 34: 65}),
        (16, (0.5, 1.0), {1: 1, 2: 65, 65: 65, 500: 513, 514: 577}),
        (32, (0.75,), {2: 129}),
    ],
)
def test_aligned_sides(output_stride, scales, sides):
    network, views = build(output_stride), make_views(scales, False)
    assert {side: aligned_side(side, network, views) for side in sides} == sides


def whole(network, image, how):
    """Probabilities of an image that goes through the network in one piece."""
    _, height, width = image.shape
    size = tuple(aligned_side(side, network, how.views) for side in (height, width))
    images = pad_image(image, size, MEAN)[None]
    with torch.no_grad():
        found = reference_probabilities(network, images, how.scales, how.flip)
    return found[0, :, :height, :width]


def in_regions(network, image, how):
    """Labels, probabilities, how often every pixel was written, and the number of regions."""
    _, height, width = image.shape
    labels = torch.full((height, width), 255, dtype=torch.uint8)
    probabilities = torch.zeros(5, height, width)
    written = torch.zeros(height, width, dtype=torch.int)
    regions = 0
    for region in infer(network, image, how, probabilities=True):
        labels[region.rows, region.columns] = region.labels
        probabilities[:, region.rows, region.columns] = region.probabilities
        written[region.rows, region.columns] += 1
        regions += 1
    assert (written == 1).all()
    return labels, probabilities, regions


# Half the receptive field is 549 pixels at output stride 16 (strides and rates of the layers summed
# up) and scale 1, and as much wider as a scale is smaller.
@pytest.mark.parametrize("image_level_features", [True, False])
@pytest.mark.parametrize(
    ("how", "size", "regions"),
    [
        (Inference(tile=1537, overlap=1280), (40, 2300), 4),
        (Inference(tile=1537, overlap=1280), (1700, 18), 2),
        (Inference(tile=1793, overlap=1536, scales=(0.75, 1.5), flip=True), (50, 2100), 3),
    ],
)
def test_tiles_equal_the_whole_image(how, size, regions, image_level_features):
    network = build(image_level_features=image_level_features)
    image = picture(*size)
    expected = whole(network, image, how)
    labels, probabilities, number = in_regions(network, image, how)
    assert number == regions
    # Resizing computes coordinates in float32: at pixel 3000 of a scaled image the whole image's
    # are 1e-4 pixels off, so that both results lie 6e-5 from one in float64.
    exact = how.scales == (1.0,)
    assert (probabilities - expected).abs().max() < (1e-5 if exact else 1e-4)
    sure = expected.topk(2, dim=0).values.diff(dim=0).abs()[0] > 2e-4
    assert sure.float().mean() > 0.99
    assert torch.equal(labels[sure], expected.argmax(dim=0).to(torch.uint8)[sure])


def test_tiles_without_enough_overlap_differ_at_their_borders():
    network, image = build(), picture(40, 700)
    how = Inference(tile=385, overlap=0)
    _, probabilities, regions = in_regions(network, image, how)
    assert regions == 2
    assert (probabilities - whole(network, image, how)).abs().max() > 1e-3


def test_image_level_features_of_tiles_are_the_whole_images():
    """Left half black, right half bright: what a tile pools alone is not what the image has."""
    network = build()
    image = torch.cat([picture(33, 1000) // 8, 255 - picture(33, 1001) // 8], dim=2)
    how = Inference(tile=1537, overlap=1280)
    pooled = []
    hook = network.aspp.register_forward_pre_hook(lambda module, args: pooled.append(args))
    in_regions(network, image, how)
    hook.remove()
    with torch.no_grad():
        mean = network.features(pad_image(image, (33, 2001), MEAN)[None]).high_level.mean((2, 3))
    assert len(pooled) > 1
    for features, image_mean in pooled:
        assert torch.allclose(image_mean.flatten(), mean.flatten(), atol=1e-5)
        assert not torch.allclose(features.mean((2, 3)), mean, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (37, 200), (64, 65), (130, 129)])
@pytest.mark.parametrize("how", [Inference(), Inference(scales=(0.5, 1.0, 1.25), flip=True)])
def test_small_images_of_any_size(size, how):
    network, image = build(), picture(*size)
    labels, probabilities, regions = in_regions(network, image, how)
    assert regions == 1
    assert (probabilities - whole(network, image, how)).abs().max() < 1e-5
    assert torch.allclose(probabilities.sum(0), torch.ones(size), atol=1e-5)
    assert labels.max() < 5


@pytest.mark.parametrize("output_stride", [16, 32])
@pytest.mark.parametrize("overlap", [0, 256])
@pytest.mark.parametrize("side", [385, 386, 500, 642, 1000])
def test_regions_cover_every_pixel_once(output_stride, overlap, side):
    network = build(output_stride, image_level_features=False)
    how = Inference(tile=385, overlap=overlap, scales=(0.25,))
    in_regions(network, torch.zeros(3, 3, side, dtype=torch.uint8), how)
    in_regions(network, torch.zeros(3, side, 1, dtype=torch.uint8), how)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": ()}, r"scales: \[\]; give multiples of 0.25"),
        ({"scales": (1.0, 0.6)}, "multiples of 0.25 above 0"),
        ({"scales": (0.0,)}, "multiples of 0.25 above 0"),
        ({"tile": 1000}, "tile: 1000 is not a multiple of 128 plus 1; take 1025"),
        ({"tile": 1}, "take 129"),
        ({"overlap": 100}, "overlap: 100 is not a multiple of 256"),
        ({"overlap": -256}, "overlap: -256"),
        ({"tile": 257, "overlap": 256}, r"below tile \(257\) - 1"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Inference(**changes)
