import pytest

from model.complexity import complexity, paper_rows
from model.config import ModelConfig

ROWS = list(paper_rows())
# The paper's own slip: its multi-scale rows of the same network say 102.8 (docs/networks.md).
SLIP = 101.28


def _count(output_stride=16, task="segmentation", classes=21, size=(513, 513), **config):
    return complexity(ModelConfig(output_stride=output_stride, **config), task, classes, size)


@pytest.mark.parametrize("row", ROWS, ids=[f"table{r.table}-{r.row}" for r in ROWS])
def test_multiply_adds_of_tables_3_and_5(row):
    ours = row.measure().paper_multiply_adds / 1e9
    assert ours == pytest.approx(row.paper, rel=0.015 if row.paper == SLIP else 0.004)


def test_there_are_28_different_rows():
    assert [(row.table, row.row) for row in ROWS] == [
        *((3, number) for number in range(1, 13)),
        *((5, number) for number in range(1, 17)),
    ]
    assert len({(row.config, row.scales, row.flip) for row in ROWS}) == 28


@pytest.mark.parametrize(
    ("config", "true", "paper"),
    [
        ({}, 54.04, 54.05),
        ({"backbone": "xception41"}, 40.01, 40.03),
        ({"backbone": "xception71"}, 66.07, 66.08),
        ({"backbone": "xception71", "output_stride": 8}, 189.96, 190.07),
        ({"backbone": "resnet_v1_101_beta", "multi_grid": (1, 2, 4)}, 65.17, 67.03),
        ({"size": (1025, 2049), "classes": 19}, 418.38, 418.45),
    ],
)
def test_both_ways_of_counting(config, true, paper):
    found = _count(**config)
    assert found.multiply_adds / 1e9 == pytest.approx(true, abs=0.006)
    assert found.paper_multiply_adds / 1e9 == pytest.approx(paper, abs=0.006)


def test_scales_add_up_and_flips_double():
    sizes = {0.5: (17, 33), 1.0: (33, 65), 1.5: (49, 97)}
    config = ModelConfig(width=0.125, middle_units=1)
    one = [complexity(config, "segmentation", 5, size).multiply_adds for size in sizes.values()]
    many = complexity(config, "segmentation", 5, (33, 65), scales=(*sizes,), flip=True)
    assert many.multiply_adds == 2 * sum(one)


def test_a_classifier_counts_its_linear_layer():
    config = ModelConfig(backbone="xception41", width=0.125, middle_units=1)
    few, more = (complexity(config, "classification", k, (33, 33)) for k in (10, 11))
    assert more.multiply_adds - few.multiply_adds == 256
    assert more.parameters - few.parameters == 257


def test_a_timm_backbone_counts_as_timm_does():
    found = _count(32, "classification", 1000, (224, 224), backbone="timm:resnet50")
    assert found.multiply_adds / 1e9 == pytest.approx(4.09, abs=0.01)  # He et al.: 3.8, v1.5: 4.1
