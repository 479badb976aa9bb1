"""What a run reports through DeepSpeed's monitors, and which of its sections are refused."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import yaml
from test_command_line import shell

from bone_ds import ds_json, monitoring
from bone_ds import engine as engines
from bone_ds.config import RunConfig, validate
from bone_ds.engine import Monitor
from bone_ds.engine.monitor import _drop_rows_after
from bone_ds.errors import CheckpointError, ConfigError
from bone_ds.train import train

STEPS = 4
PER_STEP = ("loss", "learning_rate", "grad_norm", "step_s", "positions_per_s", "tokens_per_s", "label_tokens_per_s", "memory_gib")


def resolved(directory: Path, **sections) -> dict:
    path = directory / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}} | sections))
    tree = tiny.config_tree(directory / "model", directory / "rows.jsonl", directory / "run", deepspeed={"config": str(path)})
    return ds_json.resolve(validate(tree, "run.yaml"), world_size=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two ranks at stage 3, three steps, and resumed from the checkpoint of the second, two more."""
    directory = tmp_path_factory.mktemp("monitored")
    tiny.write_model(directory / "model")
    tiny.write_rows(directory / "rows.jsonl")
    resolved(directory, csv_monitor={"enabled": True}, tensorboard={"enabled": True, "job_name": "tb"})
    tree = tiny.config_tree(directory / "model", directory / "rows.jsonl", directory / "run",
                            deepspeed={"config": str(directory / "ds.json")}, train={"log_norms_every": 2, "save_every": 2})
    (directory / "run.yaml").write_text(yaml.safe_dump(tree))
    for more in (["train.steps=3"], [f"train.steps={STEPS}", "--resume"]):
        done = shell("train", "run.yaml", "--ranks", "2", *more, directory=directory)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        if "--resume" not in more:
            shutil.rmtree(directory / "run" / "checkpoints" / "step-00000003")
    return directory / "run"


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == kind]


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of all that is reported, from events.jsonl: of a step that was trained twice the last."""
    series = {f"train/{name}": {event["step"]: event[name] for event in events(run, "step")} for name in PER_STEP}
    resumed = [event["step"] for event in events(run, "start") if event["step"]]
    series["eval/loss"] = {event["step"]: event["loss"] for event in events(run, "eval") if event["step"] not in resumed}
    norms = events(run, "norms")
    for what in ("gradient", "adapter"):
        series |= {f"{what}_norm/{name}": {event["step"]: event[what][name] for event in norms} for name in norms[0][what]}
    return {name: sorted(points.items()) for name, points in series.items()}


def test_norms_are_recorded_every_so_many_steps(run):
    norms = events(run, "norms")
    assert [event["step"] for event in norms] == [2, 4]
    assert len(norms[0]["adapter"]) == 14 and all(value > 0 for value in norms[0]["adapter"].values())
    grad_norms = {event["step"]: event["grad_norm"] for event in events(run, "step")}
    for event in norms:
        assert sum(value**2 for value in event["gradient"].values())**0.5 == pytest.approx(grad_norms[event["step"]], rel=1e-5)
    assert norms[0]["adapter"] != norms[1]["adapter"]


def test_a_step_that_was_trained_twice_is_reported_once(run):
    assert [event["step"] for event in events(run, "step")] == [1, 2, 3, 3, 4]
    assert [event["step"] for event in events(run, "eval")] == [0, 3, 2, 3, 4]
    series = expected(run)
    assert [step for step, _ in series["train/loss"]] == [1, 2, 3, 4] and [step for step, _ in series["eval/loss"]] == [0, 3, 4]


def test_csv_files_hold_what_events_hold_with_one_header_also_after_a_resume(run):
    series = expected(run)
    files = {path.stem: path for path in (run / "csv_monitor").iterdir()}
    assert files.keys() == {name.replace("/", "_") for name in series}
    for name, points in series.items():
        with files[name.replace("/", "_")].open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["step", name.rpartition("/")[2]]
        assert [(int(step), float(value)) for step, value in rows] == points


def test_tensorboard_holds_what_events_hold(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tb"))
    accumulator.Reload()
    series = expected(run)
    assert set(accumulator.Tags()["scalars"]) == series.keys()
    for name, points in series.items():
        shown = [(point.step, point.value) for point in accumulator.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in points]
        assert [value for _, value in shown] == pytest.approx([value for _, value in points], rel=1e-6)


def test_files_go_to_the_run_directory_or_where_the_json_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    given = {"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True, "output_path": "~/tb", "job_name": "a"},
             "wandb": {"enabled": True, "project": "bone"}}
    ours = resolved(tmp_path, **given)
    assert given.items() <= ours.items()  # what is written down names no directory of this run
    assert monitoring.placed(ours, Path("run")) == given | {
        "csv_monitor": {"enabled": True, "output_path": "run", "job_name": "csv_monitor"},
        "tensorboard": {"enabled": True, "output_path": "/home/someone/tb", "job_name": "a"}}
    assert not monitoring.without(ours).keys() & set(monitoring.SECTIONS)


@pytest.mark.parametrize("before, after", [
    (b"step,loss\r\n1,0.5\r\n2,0.4\r\n3,0.3\r\n12,0.2\r\n", b"step,loss\r\n1,0.5\r\n2,0.4\r\n"),
    (b"step,loss\n1,0.5\n2,0.4\n", b"step,loss\n1,0.5\n2,0.4\n"),
    (b"step,loss\n1,0.5\n4,0.4\n1,0.6\n4,0.3\n", b"step,loss\n1,0.5\n4,0.4\n1,0.6\n"),  # of another run, sooner
    (b"step,loss\n2,0.4\n1", b"step,loss\n2,0.4\n"),  # torn
    (b"step,lo", b""), (b"", b"")])
def test_rows_of_steps_to_be_trained_again_go(tmp_path, before, after):
    path = tmp_path / "train_loss.csv"
    path.write_bytes(before)
    _drop_rows_after(path, 2)
    assert path.read_bytes() == after


def test_a_file_that_can_not_be_written_is_named(tmp_path, alone):
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"}
    with engines.distributed(alone):
        monitor = Monitor({"csv_monitor": section}, None)
        (tmp_path / "csv" / "train_loss.csv").symlink_to("/dev/full")
        with pytest.raises(CheckpointError, match=f"{tmp_path}: can't be written: No space left on device"):
            monitor.write(1, {"train/loss": 0.5})


WANDB = """
calls = []
def init(**fields):
    calls.append(fields)
    {refusal}
def log(values, step=None, commit=None):
    calls.append((step, values))
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Makes the module, refusing or not, and returns a config that reports to it and to files, and what `import wandb` gives then."""
    def make(refusal: str = "") -> tuple[RunConfig, Callable[[], ModuleType]]:
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "wandb.py").write_text(WANDB.replace("{refusal}", refusal))
        monkeypatch.syspath_prepend(tmp_path / "modules")
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        (tmp_path / "ds.json").write_text(json.dumps({
            "zero_optimization": {"stage": 0}, "wandb": {"enabled": True, "project": "bone", "team": "us"},
            "csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True}}))
        model, rows = tiny.write_model(tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl")
        tree = tiny.config_tree(model, rows, tmp_path / "run", train={"steps": 2}, deepspeed={"config": str(tmp_path / "ds.json")})
        return validate(tree, "run.yaml"), lambda: import_module("wandb")

    yield make
    sys.modules.pop("wandb", None)


def test_weights_and_biases_is_told_what_events_hold(wandb, alone):
    config, module = wandb()
    run = train(config, alone).directory
    begun, *logged = module().calls
    assert begun == {"project": "bone", "group": None, "entity": "us"}
    series = {f"train/{name}": [(event["step"], event[name]) for event in events(run, "step")] for name in PER_STEP}
    series["eval/loss"] = [(event["step"], event["loss"]) for event in events(run, "eval")]
    assert sorted((step, name, value) for step, values in logged for name, value in values.items()) == sorted(
        (step, name, value) for name, points in series.items() for step, value in points)


def test_a_start_that_weights_and_biases_refuses_leaves_its_lock_alone(wandb, alone):
    config, _ = wandb("raise RuntimeError('api_key not configured (no-tty).\\ncall wandb.login()')")
    with pytest.raises(ConfigError) as error:
        train(config, alone)
    assert str(error.value) == ("deepspeed.config: wandb: api_key not configured (no-tty). call wandb.login(); run `wandb login`, "
                                "or set wandb.enabled to false")
    assert [path.name for path in Path(config.output.directory).iterdir()] == ["lock"]


@pytest.mark.parametrize("name", monitoring.SECTIONS)
def test_every_field_of_deepspeeds_sections_is_known(name):
    from deepspeed.monitor.config import DeepSpeedMonitorConfig

    section = DeepSpeedMonitorConfig.model_fields[name].annotation
    assert section.model_fields.keys() == {"enabled", *monitoring._FIELDS[name]}


@pytest.mark.parametrize("sections, says", [
    ({"csv_monitor": True}, "csv_monitor: is True; give an object"),
    ({"csv_monitor": {}}, "csv_monitor.enabled: is None; give true or false"),
    ({"csv_monitor": {"enabled": "yes"}}, "csv_monitor.enabled: is 'yes'; give true or false"),
    ({"tensorboard": {"enabled": True, "jobname": "a"}}, "tensorboard.jobname: is no field known here; did you mean 'job_name'"),
    ({"tensorboard": {"enabled": True, "output_path": 5}}, "tensorboard.output_path: 5 is no text"),
    ({"wandb": {"enabled": True, "team": None}}, "wandb.team: None is no text"),
    ({"comet": {"enabled": True}}, "comet: is no section known here"),
], ids=str)
def test_a_section_that_is_refused(tmp_path, sections, says):
    with pytest.raises(ConfigError, match="ds.json: ") as error:
        resolved(tmp_path, **sections)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_monitor_whose_package_is_missing_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(monitoring, "find_spec", lambda package: None)
    monitoring.check_installed(resolved(tmp_path, **{name: {"enabled": False}}, csv_monitor={"enabled": True}))
    with pytest.raises(ConfigError, match=f"{name}: needs the package {name}, which is not installed; pip install {name}"):
        monitoring.check_installed(resolved(tmp_path, **{name: {"enabled": True}}))


def test_a_directory_of_the_package_s_name_is_not_the_package(tmp_path, monkeypatch):
    """`wandb` leaves one where a command is started, which Python finds as a namespace."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert monitoring.find_spec("wandb") is not None
    with pytest.raises(ConfigError, match="wandb: needs the package wandb, which is not installed"):
        monitoring.check_installed(resolved(tmp_path, wandb={"enabled": True}))
