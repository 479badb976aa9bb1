"""What `bone-ds profile` makes of measurements: variants, ratios, rows, table, page; and what it refuses."""

import csv
import json
import re
import time
from argparse import Namespace
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from bone_ds import launch
from bone_ds.cli import main
from bone_ds.config import load_config
from bone_ds.errors import CheckpointError, ConfigError, InjectionError
from bone_ds.live import Moment
from bone_ds.profile import memory, page, plots, report, summary, table, turns, worker
from bone_ds.profile.clock import Span
from bone_ds.profile.measurement import COMPONENTS, Failure, Kinds, Measurement, Memory, Step, read
from bone_ds.profile.summary import LABEL_TOKENS, RESIDENT, STEP, Spread, Summary, ratio
from bone_ds.profile.turns import Result
from bone_ds.profile.variants import Variant, variants

GIB = 2**30
CONFIG = """
model: {path: model, dtype: fp32}
adapter: {method: bone, grouping: row, rank: 8, layers: [0, 1]}
data: {train: train.jsonl}
train: {steps: 2, global_batch_size: 2}
output: {directory: run}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config whose model and data are there by name alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "model").mkdir()
    return "run.yaml"


def turn(step_s=2.0, label_tokens=100, resident_gib=3.0) -> Measurement:
    """A synthetic one: half of a step is backward; the peak is half weights and half activations."""
    parts_s = {"data": 0.0, "forward": 0.3 * step_s, "backward": 0.5 * step_s, "optimizer": 0.1 * step_s, "rest": 0.1 * step_s}
    at_peak = dict.fromkeys(COMPONENTS, 0) | {"weights": GIB, "activations": GIB}
    by_component = {name: [size, size] for name, size in at_peak.items()} | {"activations": [GIB, 0]}
    return Measurement(
        world_size=1, device="cpu", trainable_parameters=12345, steps=[Step(parts_s, 400, 300, label_tokens)] * 2,
        resident_bytes=int(resident_gib * GIB), allocated_bytes=None, reserved_bytes=None, matrix_peak_flops=1e11,
        kinds=Kinds(step_s, {"adapted layers": 0.6 * step_s, "other": 0.4 * step_s}, 0.5 * step_s),
        memory=Memory(2 * GIB, at_peak, [0.0, step_s], by_component, [("forward", 0.0, 0.4), ("backward", 0.4, step_s)]))


def summaries(config) -> list[Summary]:
    loaded = load_config(config)
    return [Summary(Result(Variant("lora", loaded), [turn(2.0), turn(4.0)]), None),
            Summary(Result(Variant("row", loaded), [turn(2.5), turn(4.0, resident_gib=6)]), None)]


def test_ratios_are_taken_turn_by_turn(config):
    lora, row = summaries(config)
    assert ratio(row, lora, LABEL_TOKENS) == Spread(pytest.approx((0.8 + 1) / 2), pytest.approx(0.8), pytest.approx(1))
    assert ratio(row, lora, STEP) == Spread(pytest.approx((1.25 + 1) / 2), pytest.approx(1), pytest.approx(1.25))
    assert ratio(row, lora, RESIDENT) == Spread(1.5, 1.0, 2.0)
    assert ratio(lora, lora, STEP) == Spread(1, 1, 1)
    assert lora.spread(LABEL_TOKENS) == Spread(37.5, 25, 50)
    assert sum(lora.part_shares.values()) == pytest.approx(1) and lora.part_shares["backward"] == pytest.approx(0.5)


def test_rows_carry_figure_ratio_and_provenance(config):
    lora, row = summaries(config)
    made = summary.rows([lora, row], lora)
    rates = {line["variant"]: line for line in made if line["name"] == "loss-bearing tokens"}
    assert rates["lora"]["figure"] == 37.5 and rates["lora"]["ratio"] is None
    assert rates["row"]["compared with"] == "lora" and rates["row"]["ratio"] == pytest.approx(0.9)
    origin = {"commit": "abc", "versions": {"torch": "2"}}
    assert json.loads(summary.as_json(made, origin)) == {"provenance": origin, "rows": made}
    lines = list(csv.DictReader(summary.as_csv(made, origin).splitlines()))
    assert len(lines) == len(made) and json.loads(lines[-1]["provenance"]) == origin
    assert float(lines[0]["figure"]) == made[0]["figure"]


def test_the_table_says_what_was_measured(config):
    lora, row = summaries(config)
    text = table.table([lora, row], [Result(row.result.variant, [], Failure("does not fit: too large"))], lora)
    for part in ("lora: 12,345 trainable parameters, 1 rank, cpu", "backward 50%", "adapted layers 60%", "against lora, over 2 turns",
                 "0.900 (0.800-1.000)", "row: does not fit: too large", "weights                  1.000"):
        assert part in text, text
    assert max(map(len, text.splitlines())) <= 140


class Checker(HTMLParser):
    """Every tag that is opened is closed, in order; the addresses that would be fetched."""

    VOID = {"meta", "link", "br", "img", "hr", "input"}

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_needs_nothing_from_outside(config, tmp_path, count):
    compared = summaries(config)[:count]
    drawn = report._draw(compared, tmp_path)
    failed = [Result(replace(compared[0].result.variant, name="<large>"), [], Failure("does not fit: it was killed"))]
    origin = {"commit": None, "processor": "a & b", "cores": 2, "versions": {"torch": "2"}}
    text = page.page(compared, failed, compared[0], drawn, {"lora": CONFIG}, origin)
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == [] and not {"script", "link", "img", "iframe", "object"} & set(checker.tags)
    assert all(address.startswith("#") for address in checker.addresses)
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http" not in without_names and "@import" not in text
    assert set(re.findall(r"url\(([^)]{1,9})", text)) <= {f"#{name}"[:9] for name in drawn}
    assert len(drawn) == count + 2 and text.count("<svg") == len(drawn)
    for name, svg in drawn.items():
        ElementTree.fromstring(svg)
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert "#1b1f24" not in svg and "var(--ink)" in svg  # text follows the page's theme
    assert (tmp_path / "overview.png").stat().st_size > 10000
    identifiers = re.findall(r'\sid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert "&lt;large&gt;" in text and "a &amp; b" in text and "grouping: row" in text


def test_small_differences_are_drawn_small(config):
    figure = plots.throughput_and_memory(summaries(config))
    low, high = figure.axes[0].get_ylim()
    assert low < 32.5 < 37.5 < high and high - low >= 0.2 * 37.5


def test_storages_are_told_by_part_and_by_how_long_they_live():
    moments = [
        (0.0, 100, "weights", 1),
        (1.1, 30, "other", 2), (1.2, 5, "other", 3), (1.3, -5, "other", 3),  # forward keeps 30
        (2.1, 7, "zero", 4), (2.2, 9, "other", 5), (2.3, -30, "other", 2), (2.4, -7, "zero", 4),  # backward leaves 9
        (2.45, 50, "gathered", 6), (2.46, -50, "gathered", 6), (2.47, 4, "other", 3), (2.48, -4, "other", 3),  # a number used again
        (3.1, 11, "other", 7), (3.2, 3, "other", 8), (3.3, -3, "other", 8), (3.4, -9, "other", 5)]
    history, total, by_component = [], 0, {}
    for time_s, change, component, storage in moments:
        total += change
        by_component = {**by_component, component: by_component.get(component, 0) + change}
        history.append(Moment(time_s, total, by_component, storage))
    spans = [Span("forward", 1.0, 2.0), Span("backward", 2.0, 3.0), Span("optimizer", 3.0, 4.0)]
    measured = memory._memory(history, 1, spans)
    highest = {name: max(sizes) for name, sizes in measured.by_component.items()}
    assert highest == {"weights": 100, "adapter": 0, "optimizer": 11, "gradients": 9, "buckets": 7, "gathered": 50, "activations": 30,
                       "transient": 5}
    assert measured.peak_bytes == 159 == sum(measured.at_peak.values())
    assert measured.at_peak == dict.fromkeys(COMPONENTS, 0) | {"weights": 100, "gradients": 9, "gathered": 50}
    assert measured.phases[1] == ("backward", 1.0, 2.0) and measured.time_s[0] == 0


def test_thinning_keeps_the_peak():
    line = [(index / 10000, {"weights": index % 977}) for index in range(10000)]
    kept = memory._thinned(line)
    assert len(kept) <= 801 and max(point[1]["weights"] for point in kept) == 976 and kept[-1] == line[-1]


def test_variants(config, tmp_path):
    assert [variant.name for variant in variants(config, ["adapter.rank=4"], [])] == ["run"]
    (tmp_path / "more.yaml").write_text("col: adapter.grouping=col\nas it is:\n")
    texts = ["row r=4: data.max_length=64", "lora: adapter.method=lora adapter.rank=3 adapter.targets='[q_proj, v_proj]'", "more.yaml"]
    found = {variant.name: variant for variant in variants(config, ["adapter.rank=4"], texts)}
    assert list(found) == ["row r=4", "lora", "col", "as it is"]
    assert found["row r=4"].config.data.max_length == 64 and found["row r=4"].file_name == "1-row-r=4"
    lora = found["lora"].config.adapter
    # grouping means nothing to lora and falls away, layers stay
    assert (lora.method, lora.rank, lora.targets, lora.layers) == ("lora", 3, ("q_proj", "v_proj"), (0, 1))
    assert found["col"].config.adapter.grouping == "col" and found["col"].config.adapter.rank == 4
    budget = variants(config, [], ["budget: adapter.parameters=5000"])[0].config.adapter
    assert budget.parameters == 5000 and not budget.has_rank and budget.layers == (0, 1)
    assert variants(config, ["adapter.parameters=9"], ["a: adapter.rank=3"])[0].config.adapter.parameters is None
    assert found["as it is"].config == load_config(config, ["adapter.rank=4"])
    free = ["adapter.grouping=free", "adapter.groups=2"]
    row, fewer = variants(config, free, ["row: adapter.grouping=row", "fewer: adapter.groups=1"])
    assert row.config.adapter.groups is None and fewer.config.adapter.groups == 1  # groups mean nothing to row


def test_names_without_latin_letters_have_files_of_their_own(config):
    found = variants(config, [], ["行: adapter.rank=4", "列: adapter.rank=8"])
    assert [variant.name for variant in found] == ["行", "列"] and [variant.file_name for variant in found] == ["1", "2"]


@pytest.mark.parametrize("arguments, says", [
    (["--compare", "adapter.rank=4"], ["--compare 'adapter.rank=4'", "no name"]),
    (["--compare", "data.prompt=text: adapter.rank=4"], ["has no name"]),
    (["--compare", "short: data.max_length"], ["'data.max_length' sets nothing", "write NAME:"]),
    (["--compare", "a: adapter.targets='[q"], ["--compare", "No closing quotation"]),
    (["--compare", "a: adapter.gruoping=col"], ["--compare 'a': adapter.gruoping", "did you mean 'grouping'?"]),
    (["--compare", "a: adapter.method=lorra"], ["--compare 'a': adapter.method", "lorra"]),
    (["--compare", "a: adapter.rank=4", "--compare", "a: adapter.rank=8"], ["two variants are called 'a'"]),
    (["--compare", "twice.yaml"], ["two variants are called 'a'"]),
    (["--compare", "empty.yaml"], ["empty.yaml", "NAME: section.key=value"]),
    (["--compare", "gone.yaml"], ["gone.yaml", "can't be read"]),
    (["--compare", "list.yaml"], ["list.yaml", "NAME: section.key=value"]),
    (["--compare", "a: adapter.rank=4", "--to", "b"], ["--to: 'b'", "choose one of a"]),
    (["adapter.rnk=4"], ["adapter.rnk", "did you mean 'rank'?"]),
    (["data.train=gone.jsonl"], ["data.train: gone.jsonl"]),
    (["--compare", "a: data.train=gone.jsonl"], ["data.train: gone.jsonl"]),
    (["--compare", "a: train.global_batch_size=3", "--ranks", "2"], ["train.global_batch_size: 3"]),
    (["--out", "model"], ["--out: model exists already"]), (["--out", "no/where"], ["no/where", "no directory no"]),
    (["--json", "train.jsonl"], ["--json: train.jsonl exists already"]), (["--csv", "no/a.csv"], ["--csv: no/a.csv"]),
    (["--steps", "0"], ["--steps: 0 is too small"]), (["--turns", "0"], ["--turns: 0 is too small"]),
    (["--ranks", "0"], ["--ranks: 0 is too small"]),
], ids=str)
def test_refused_in_a_line(config, tmp_path, capsys, arguments, says):
    for name, text in {"list": "[a, b]", "twice": "a: adapter.rank=4\na: adapter.rank=8", "empty": "{}"}.items():
        (tmp_path / f"{name}.yaml").write_text(f"{text}\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(["profile", config, *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("bone-ds: ") and output.err.count("\n") == 1, output.err
    assert all(part in output.err for part in says), output.err
    assert sorted(tmp_path.rglob("*")) == before


def test_under_a_launcher_it_is_refused(config, monkeypatch, capsys):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["profile", config]) == 2
    assert "--ranks" in capsys.readouterr().err


def started(codes):
    """A launcher whose workers end with these codes by variant, and write a measurement if that is 0."""
    starts = []

    def start(arguments, ranks):
        out = Path(arguments[arguments.index("--worker") + 1])
        starts.append((out.stem, "--timing-only" in arguments, ranks))
        code = codes[int(out.stem[0]) - 1]
        if code == 0:
            turn().write(out)
        if code == 3:
            Failure("does not fit: 3 GiB more").write(out)
        return code

    return start, starts


def test_what_does_not_fit_is_told_and_the_others_go_on(config, tmp_path, monkeypatch):
    start, starts = started([0, 137, 3, 0])
    monkeypatch.setattr(launch, "start", start)
    texts = ["fits:", "killed: adapter.rank=4", "refused memory:", "also fits:"]
    results = turns.measure(variants(config, [], texts), 2, 1, 2, tmp_path / "out", lambda line: None)
    assert [len(result.turns) for result in results] == [2, 0, 0, 2]
    assert [result.failure and result.failure.reason[:20] for result in results] == [
        None, "does not fit: the sy", "does not fit: 3 GiB ", None]
    assert starts == [("1-fits-1", False, 2), ("2-killed-1", False, 2), ("3-refused-memory-1", False, 2), ("4-also-fits-1", False, 2),
                      ("4-also-fits-2", True, 2), ("1-fits-2", True, 2)]  # the second turn the other way round
    assert load_config(tmp_path / "out/configs/2-killed.yaml").adapter.rank == 4
    assert read(tmp_path / "out/turns/1-fits-2.json") == turn()


@pytest.mark.parametrize("code, reason", [(139, "ended by signal 11"), (134, "ended by signal 6"), (1, "ended with exit code 1")])
def test_a_worker_that_crashes_is_told_and_the_others_go_on(config, tmp_path, monkeypatch, code, reason):
    monkeypatch.setattr(launch, "start", started([0, code])[0])
    results = turns.measure(variants(config, [], ["whole:", "broken:"]), 1, 1, 2, tmp_path / "out", lambda line: None)
    assert [len(result.turns) for result in results] == [2, 0] and results[1].failure == Failure(reason)


def test_timings_outlive_the_instruments(config, tmp_path, monkeypatch, capsys):
    """The worker writes what it has timed before the steps with instruments, and is killed in these."""
    def start(arguments, ranks):
        replace(turn(), kinds=None, memory=None).write(Path(arguments[arguments.index("--worker") + 1]))
        return 137

    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(report, "_plan", lambda *arguments: None)
    assert main(["profile", config, "--ranks", "1", "--out", str(tmp_path / "out")]) == 0
    assert "2 s a step, timed alone" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"time_by_part.png", "overview.png"}


@pytest.mark.parametrize("code, ends, kept", [(2, 2, False), (130, 130, True), (143, 143, True), (0, 1, True)])
def test_a_worker_that_refuses_its_config_or_is_told_to_end_ends_it_all(config, tmp_path, monkeypatch, code, ends, kept):
    """Ctrl-C keeps the turns that are over, and doesn't take the one that has its timings for such."""
    codes = [0, code]

    def start(arguments, ranks):
        if len(codes) == 2 or code == 130:
            turn().write(Path(arguments[arguments.index("--worker") + 1]))
        return codes.pop(0)

    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(report, "_plan", lambda *arguments: None)
    assert main(["profile", config, "--ranks", "1", "--turns", "3", "--out", str(tmp_path / "out")]) == ends
    assert (tmp_path / "out/turns/1-run-1.json").exists() == kept and codes == []


def test_what_the_plan_refuses_ends_it_before_anything_is_measured(config, tmp_path, monkeypatch, capsys):
    def plan(variant, *arguments, **named):
        raise {4: CheckpointError("no sizes"), 8: InjectionError("adapter.rank: 8 divides no layer")}[variant.adapter.rank]

    monkeypatch.setattr(report.plans, "plan", plan)
    monkeypatch.setattr(launch, "start", None)
    texts = ["--compare", "small: adapter.rank=4", "--compare", "as it is:"]
    assert main(["profile", config, "--ranks", "1", "--out", str(tmp_path / "out"), *texts]) == 2
    output = capsys.readouterr()
    assert output.out == "small: no prediction: no sizes\n" and output.err == "bone-ds: as it is: adapter.rank: 8 divides no layer\n"
    assert not (tmp_path / "out").exists()


class SleepingEngine:
    """Its parts take known times."""

    world_size = 1

    def losses(self, batches):
        for _ in batches:
            time.sleep(0.03)
            yield torch.ones(())

    def backward(self, loss, boundary):
        time.sleep(0.05)

    def update(self, learning_rate):
        time.sleep(0.02)
        return 1.0


def test_a_clock_outside_shows_the_same_step(config, monkeypatch):
    """Two micro-batches; the sums over the ranks are of the rest."""
    monkeypatch.setattr(worker.engines, "barrier", lambda: None)
    monkeypatch.setattr("bone_ds.step.engines.total", lambda values, device: (time.sleep(0.04), values)[1])
    batch = Namespace(tokens=torch.zeros(1, 7, dtype=torch.long))
    run = Namespace(config=load_config(config), device=torch.device("cpu"), engine=SleepingEngine(), steps=3,
                    batches=lambda window: (time.sleep(0.01), [batch, batch])[1])
    started = time.monotonic()
    step = worker._Run.timed(run, Namespace(label_tokens=5, unit_tokens=[3, 4]))
    outside_s = time.monotonic() - started
    assert step.total_s == pytest.approx(outside_s, abs=0.01)
    assert step.parts_s == pytest.approx({"data": 0.01, "forward": 0.06, "backward": 0.10, "optimizer": 0.02, "rest": 0.04}, abs=0.015)
    assert (step.positions, step.tokens, step.label_tokens) == (14, 7, 5)


@pytest.mark.parametrize("changes, title", [
    ([], "Bone row, r = 8"), (["adapter.parameters=20000"], "Bone row, 12,345 parameters"),
    (["adapter.method=lora", "adapter.parameters=20000"], "LoRA, 12,345 parameters")])
def test_the_title_says_what_was_trained(config, changes, title):
    variant = variants(config, [], [f"a: {' '.join(changes)}"])[0]
    assert page._title([Summary(Result(variant, [turn()]), None)]) == title


def test_arithmetic_is_that_of_the_tokens_that_were_timed(config):
    """The plan's mean step has 600 tokens, the timed ones 300 of 2 s and of 4 s; the peak is the median of the turns'."""
    plan = Namespace(flops=Namespace(total=6e12), workload=Namespace(tokens_per_step=600.0))
    slow = replace(turn(4.0), matrix_peak_flops=3e11)
    summary = Summary(Result(Variant("row", load_config(config)), [turn(2.0), slow]), plan)
    assert summary.flops == pytest.approx(6e12 * (150 + 75) / 2 / 600)
    assert summary.matrix_peak_flops == 2e11 and summary.share_of_matrix_peak == pytest.approx(summary.flops / 2e11)


def test_no_such_config():
    with pytest.raises(ConfigError, match="can't be read"):
        variants("absent.yaml", [], [])
