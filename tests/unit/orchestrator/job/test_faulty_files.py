"""Job files as people get them wrong: refused in one line with file, field, value and cure."""

from pathlib import Path

import pytest

from orchestrator.errors import JobFileError
from orchestrator.job.config import PipelineJob, StageJob
from orchestrator.job.job_file import load_job

SOUND = """\
kind: stage
name: mine
task: segmentation
data_root: /data
model: {backbone: xception41, output_stride: 16}
data:
  train: {dataset: voc, split: trainaug, crop: 65, scale: [0.5, 2.0]}
  val: {dataset: voc, split: val}
optimizer: {name: sgd, lr: 0.007, momentum: 0.9, weight_decay: 4.0e-5}
schedule: {name: poly, power: 0.9}
global_batch: 16
steps: 100
cluster: {workers: 1}
"""


def load(tmp_path: Path, text: str | bytes) -> StageJob | PipelineJob:
    path = tmp_path / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_job(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 0.007", "lr: fast", "optimizer.lr: 'fast': should be a number"),
        ("lr: 0.007", "lr: .inf", "optimizer.lr: inf: should be a finite number"),
        ("lr: 0.007", "lr: .nan", "optimizer.lr: nan: should be"),
        ("lr: 0.007", "lr: true", "optimizer.lr: should be a number"),
        ("lr: 0.007", "lr: [0.007]", "optimizer.lr: should be a number"),
        ("name: sgd", "name: SGD", "optimizer.name: 'SGD': did you mean 'sgd'? choose sgd, adamw"),
        ("steps: 100", "steps: 30K", "steps: '30K': should be a whole number"),
        ("steps: 100", "steps: 1.5", "steps: 1.5: should be a whole number"),
        ("steps: 100", "steps: true", "steps: should be a number"),
        ("steps: 100", "steps:", "give exactly one of steps and epochs"),
        ("steps: 100", "epochs: .inf", "epochs: inf: should be a finite number"),
        ("name: mine", "name: My Run", "name: 'My Run': should be of lower-case letters"),
        ("name: mine", "name: 2012", "name: 2012: should be a text"),
        ("name: mine", "name:", "name: null: should be a text"),
        ("crop: 65", "crop: 65x65", "crop: '65x65': should be a whole number or a list"),
        ("crop: 65", "crop: [1, 2, 3]", "data.train.crop: should be a whole number or"),
        ("scale: [0.5, 2.0]", "scale: 0.5", "data.train.scale: 0.5: should be a list"),
        ("scale: [0.5, 2.0]", "scale: [2.0, 0.5]", "scale: [2.0, 0.5] is not [least, most]"),
        ("scale: [0.5, 2.0]", "scale: [50, 200]", "should be less than or equal to 16"),
        ("scale: [0.5, 2.0]", "scale: [0.8, 1.2]", "do not come to 1.2; 0 draws any scale"),
        ("{name: poly, power: 0.9}", "poly", "schedule: 'poly': should be a section"),
        ("steps: 100", "steps: 100\nema: 0.9999", "ema: 0.9999: should be a section"),
        ("workers: 1}", "workers: [0, 2]}", "cluster.workers[0]: 0: should be greater than or"),
        ("workers: 1}", "workers: 1, gpus_per_worker: yes}", "gpus_per_worker: 'yes': should be"),
        ("task:", "deadline: tomorrow\ntask:", "deadline: 'tomorrow': should be a date and time"),
        ("task:", "deadline: [1]\ntask:", "should be a date and time with its zone, such as 2026"),
        ("task:", "start_from: ''\ntask:", "start_from: '': is empty; leave start_from out"),
        ("task:", "start_from: https://a/b.pth\ntask:", "https:// is not read; download it"),
        ("kind: stage", "kind: pipeline", "'pipeline' has stages; one with a task is kind: stage"),
        ("steps: 100", "steps: 100\n5: 6", "the key 5 should be a text"),
        ("steps: 100", "steps: 100\nloss: {class_weights: {0: 1}}", "the key 0 should be a text"),
        ("/data", "$HOME/data", "data_root: '$HOME/data': $ begins a variable's name: write ${"),
        ("/data", '""', "data_root: '': is empty; name a directory"),
        ("/data", '"${UNSET_PLACE:-}"', "is empty; name a directory"),
        ("/data", "~nobody-here/data", "data_root: '~nobody-here/data': could not determine home"),
        ("  train:", "\ttrain:", "line 7, column 1: found character '\\t' that cannot start any"),
        ("steps: 100", "steps:100", "line 12, column 1: could not find expected ':'; a key needs"),
        ("task: seg", " task: seg", "line 3, column 6: mapping values are not allowed here; a key"),
        ("name: mine", "name: {{ name }}", "found unhashable key; a text that begins with {"),
        ("name: mine", "name: *base", "line 2, column 7: found undefined alias 'base'; *name"),
        ("steps: 100", "steps: 100\nsteps: 5", "line 13, column 1: the key 'steps' is given twice"),
        ("steps: 100", "steps: 100\n---\na: 1", "but found another document; one job to a file"),
        ("steps: 100", "steps: !!python/name:os.system 1", "tags (!name) have no meaning here"),
        ("output_stride", "output‐stride", "unknown key; did you mean 'output_stride'?"),
        ("mine", "mi\0ne", "unacceptable character #x0000"),
        ("task: segmentation", "task: classification", "data.train.scale is for segmentation"),
    ],
)
def test_one_slip(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert load(tmp_path, SOUND)
    assert old in SOUND
    with pytest.raises(JobFileError) as error:
        load(tmp_path, SOUND.replace(old, new))
    text = str(error.value)
    assert message in text
    assert all(line.startswith(f"{tmp_path / 'job.yaml'}: ") for line in text.splitlines())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; a job file is a mapping"),
        (b"# nothing\n", "is empty"),
        (b"- kind: stage\n", "holds a list"),
        (b"stage\n", "holds a str"),
        (SOUND.encode("utf-16-le"), "#x0000: special characters are not allowed"),
        ("kind: stage\n".encode("utf-16-le"), "save it as UTF-8"),
        (SOUND.encode("utf-16"), "byte 0 is not UTF-8"),
        ("# Größe\n".encode("latin-1"), "byte 4 is not UTF-8 (invalid start byte); save it as"),
        (b"kind: stage\nx: " + b"[" * 3000, "is nested too deeply"),
        (b"kind: pipeline\nname: p\nstages: [gone.yaml]\n", "job.yaml: stages[0]: "),
        (b"kind: pipeline\nname: p\nstages: [job.yaml]\n", "is not of kind: stage"),
        (b"kind: pipeline\nname: p\nstages: [{kind: sweep}]\n", "[0]: kind: 'sweep': what is"),
        (b"kind: pipeline\nname: p\nstages: {a: 1}\n", "stages: should be a list"),
        (b"kind: pipeline\nname: p\nstages:\n", "stages: null: should be a list"),
        (b"kind: pipeline\nname: p\nstages: [5]\n", "stages[0]: 5: should be a section"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(JobFileError) as error:
        load(tmp_path, content)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "job.yaml"))


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="cannot be read: Is a directory"):
        load_job(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "steps", "decay"),
    [
        ("4.0e-5", "4e-5", 100, 4e-5),  # a text to YAML 1.1
        ("steps: 100", "steps: 1e5", 100_000, 4e-5),
        ("steps: 100", "steps: 30_000", 30_000, 4e-5),
        ("steps: 100", "steps: 0100", 100, 4e-5),  # 64 to YAML 1.1
        ("\n", "\r\n", 100, 4e-5),
        ("kind: stage", "\ufeffkind: stage", 100, 4e-5),
        ("name: mine", "name: no", 100, 4e-5),  # false to YAML 1.1
    ],
)
def test_what_is_meant_is_read(
    tmp_path: Path, old: str, new: str, steps: int, decay: float
) -> None:
    job = load(tmp_path, SOUND.replace(old, new))
    assert isinstance(job, StageJob)
    assert (job.steps, job.optimizer.weight_decay) == (steps, decay)


def test_overrides_of_all_stages_and_of_shared_sections(tmp_path: Path) -> None:
    one = SOUND.replace("kind: stage\n", "").replace("data_root: /data\n", "")
    one = one.replace("cluster: {workers: 1}", "cluster: *shared").replace("\n", "\n    ")
    other = one.replace("name: mine", "name: other").replace("*shared", "&shared {workers: 1}")
    path = tmp_path / "job.yaml"
    path.write_text(f"kind: pipeline\nname: p\nstages:\n  - {other}\n  - {one}\n")
    price, gpus = "stages.*.cluster.price_per_gpu_hour=2", "stages.mine.cluster.gpus_per_worker=1"
    job = load_job(path, (price, gpus))
    clusters = [stage.cluster for stage in job.stages]
    assert [cluster.price_per_gpu_hour for cluster in clusters] == [2, 2]
    assert [cluster.gpus_per_worker for cluster in clusters] == [0, 1]
    with pytest.raises(JobFileError, match=r"no item 'mien'; there are other, mine, and \*"):
        load_job(path, ("stages.mien.seed=1",))
