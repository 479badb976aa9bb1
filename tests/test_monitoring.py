"""What a run reports through DeepSpeed's monitors, and which of its sections are refused."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import yaml
from test_command_line import shell

from bone_ds import ds_json, monitoring
from bone_ds.config import validate
from bone_ds.errors import ConfigError

STEPS = 4
PER_STEP = ("loss", "learning_rate", "grad_norm", "step_s", "positions_per_s", "tokens_per_s", "label_tokens_per_s", "memory_gib")


def resolved(directory: Path, **sections) -> dict:
    path = directory / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}} | sections))
    tree = tiny.config_tree(directory / "model", directory / "rows.jsonl", directory / "run", deepspeed={"config": str(path)})
    return ds_json.resolve(validate(tree, "run.yaml"), world_size=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two ranks at stage 3, two steps and, resumed, two more; every monitor that is installed."""
    directory = tmp_path_factory.mktemp("monitored")
    tiny.write_model(directory / "model")
    tiny.write_rows(directory / "rows.jsonl")
    monitors = {"csv_monitor": {"enabled": True}}
    if find_spec("tensorboard"):
        monitors["tensorboard"] = {"enabled": True, "job_name": "tb"}
    resolved(directory, **monitors)
    tree = tiny.config_tree(directory / "model", directory / "rows.jsonl", directory / "run", train={"log_norms_every": 2},
                            deepspeed={"config": str(directory / "ds.json")})
    (directory / "run.yaml").write_text(yaml.safe_dump(tree))
    for more in (["train.steps=2"], [f"train.steps={STEPS}", "--resume"]):
        done = shell("train", "run.yaml", "--ranks", "2", *more, directory=directory)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return directory / "run"


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == kind]


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of all that is reported, from events.jsonl."""
    series = {f"train/{name}": [(event["step"], event[name]) for event in events(run, "step")] for name in PER_STEP}
    series["eval/loss"] = [(event["step"], event["loss"]) for event in events(run, "eval")]
    norms = events(run, "norms")
    for what in ("gradient", "adapter"):
        series |= {f"{what}_norm/{name}": [(event["step"], event[what][name]) for event in norms] for name in norms[0][what]}
    return series


def test_norms_are_recorded_every_so_many_steps(run):
    norms = events(run, "norms")
    assert [event["step"] for event in norms] == [2, 4]
    assert len(norms[0]["adapter"]) == 14 and all(value > 0 for value in norms[0]["adapter"].values())
    grad_norms = {event["step"]: event["grad_norm"] for event in events(run, "step")}
    for event in norms:
        assert sum(value**2 for value in event["gradient"].values())**0.5 == pytest.approx(grad_norms[event["step"]], rel=1e-5)
    assert norms[0]["adapter"] != norms[1]["adapter"]


def test_csv_files_hold_what_events_hold_with_one_header_also_after_a_resume(run):
    series = expected(run)
    files = {path.stem: path for path in (run / "csv_monitor").iterdir()}
    assert files.keys() == {name.replace("/", "_") for name in series}
    for name, points in series.items():
        with files[name.replace("/", "_")].open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["step", name.rpartition("/")[2]]
        assert [(int(step), float(value)) for step, value in rows] == points
    assert [step for step, _ in series["train/loss"]] == [1, 2, 3, 4]


def test_tensorboard_holds_what_events_hold(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tb"))
    accumulator.Reload()
    series = expected(run)
    assert set(accumulator.Tags()["scalars"]) == series.keys()
    for name, points in series.items():
        shown = [(point.step, point.value) for point in accumulator.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in points]
        assert [value for _, value in shown] == pytest.approx([value for _, value in points], rel=1e-6)


def test_files_go_to_the_run_directory_or_where_the_json_says(tmp_path):
    ours = resolved(tmp_path, csv_monitor={"enabled": True}, tensorboard={"enabled": True, "output_path": "/tb", "job_name": "a"})
    assert ours["csv_monitor"] == {"enabled": True, "output_path": str(tmp_path / "run"), "job_name": "csv_monitor"}
    assert ours["tensorboard"] == {"enabled": True, "output_path": "/tb", "job_name": "a"}
    assert resolved(tmp_path, **{name: ours[name] for name in ("csv_monitor", "tensorboard")}) == ours
    assert not monitoring.without(ours).keys() & set(monitoring.SECTIONS)


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
