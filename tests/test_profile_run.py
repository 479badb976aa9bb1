"""`bone-ds profile` as a user starts it: a Llama under ZeRO-3 on two ranks, and two variants of an RWKV6 in turns on one."""

import csv
import gc
import gzip
import json
import os
from pathlib import Path

import pytest
import tiny
import tiny_rwkv
import torch

from bone_ds.cli import main
from bone_ds.config import dump_yaml, validate
from bone_ds.launch import Ranks
from bone_ds.live import LiveMemory
from bone_ds.profile import worker
from bone_ds.profile.measurement import COMPONENTS, read

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shell():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def profiled(directory, tree, *options):
    """The directory that was written."""
    (directory / "run.yaml").write_text(dump_yaml(validate(tree, "test")))
    out = directory / "out"
    assert main(["profile", str(directory / "run.yaml"), "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="module")
def llama(shell, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    tiny.write_model(directory / "model")
    rows = tiny.write_rows(directory / "rows.jsonl")
    zero3 = tiny.write_zero3(directory / "zero3.json")
    tree = tiny.config_tree(directory / "model", rows, directory / "run", deepspeed={"config": str(zero3)})
    return profiled(directory, tree, "--ranks", "2", "--compare", "lora: adapter.method=lora adapter.rank=3", "--turns", "1",
                    "--steps", "2", "--json", str(directory / "rows.json"), "--csv", str(directory / "rows.csv"))


def rwkv_tree(directory):
    tiny_rwkv.save_tiny(directory / "model.pth", vocabulary=256)
    rows = tiny.write_rows(directory / "rows.jsonl")
    return tiny.config_tree(directory / "model.pth", rows, directory / "run", adapter={"rank": 8}, deepspeed={"config": "zero2"})


@pytest.fixture(scope="module")
def rwkv(shell, tmp_path_factory):
    directory = tmp_path_factory.mktemp("rwkv")
    tree = rwkv_tree(directory)
    return profiled(directory, tree, "--ranks", "1", "--steps", "1", "--compare", "row:", "--compare", "lora: adapter.method=lora")


def measurement(out):
    return read(next((out / "turns").glob("1-*-1.json")))


@pytest.fixture(params=["llama", "rwkv"])
def out(request):
    return request.getfixturevalue(request.param)


def test_every_part_takes_time_and_little_is_left_over(out):
    measured = measurement(out)
    assert len(measured.steps) == (2 if measured.world_size == 2 else 1)
    for step in measured.steps:
        assert all(step.parts_s[part] > 0 for part in ("data", "forward", "backward", "optimizer", "rest"))
        assert 0 < step.label_tokens < step.tokens <= step.positions  # an idle rank computes a position
        assert step.parts_s["rest"] < 0.5 * step.total_s
    assert measured.matrix_peak_flops > 1e9 and 0.1 < measured.resident_bytes / 2**30 < 4


def test_kinds_sum_to_the_profiled_step(out):
    """The trace that is written beside is the witness."""
    measured = measurement(out)
    kinds = measured.kinds
    with gzip.open(next((out / "turns").glob("1-*.trace.json.gz")), "rt") as file:
        events = json.load(file)["traceEvents"]
    step_us = next(event["dur"] for event in events if event["name"] == "bone_ds: step" and event.get("cat") == "user_annotation")
    assert sum(kinds.by_kind_s.values()) == pytest.approx(step_us / 1e6, rel=0.05)
    assert 0 < kinds.matrix_products_s < kinds.step_s
    # What waits for the other rank is taken out of "other": on a busy machine all of that.
    expected = {"adapted layers", "head and loss", "optimizer"}
    expected |= {"attention", "communication"} if measured.world_size == 2 else {"WKV", "other"}
    assert expected <= {kind for kind, cost_s in kinds.by_kind_s.items() if cost_s > 0}


def test_the_time_line_reaches_the_peak(out):
    memory = measurement(out).memory
    assert list(memory.at_peak) == list(COMPONENTS)
    totals = [sum(sizes) for sizes in zip(*memory.by_component.values())]
    assert max(totals) == memory.peak_bytes and len(totals) == len(memory.time_s)
    assert memory.time_s == sorted(memory.time_s) and memory.phases[0][:2] == ("forward", 0.0)
    assert [part for part, _, _ in memory.phases] == ["forward", "backward"] * (len(memory.phases) // 2) + ["optimizer"]
    highest = {name: max(sizes) for name, sizes in memory.by_component.items()}
    assert highest["activations"] > 0 and highest["gradients"] > 0 and highest["transient"] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch and deepspeed
def test_the_peak_is_that_of_all_storages_since_before_the_engine(shell, tmp_path, monkeypatch):
    """Counted from outside as well, where nothing has to be found again that was there before the step."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    live, counted, others, peaks, left_over = LiveMemory(), worker.memory.counted, "what other tests left", [], []

    def both(*arguments):
        live.reset_peak()
        found = counted(*arguments)
        peaks.append(live.peak_bytes)
        left_over.append(live.at_peak.get(others, 0))
        return found

    monkeypatch.setattr(worker.memory, "counted", both)
    zero2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5000}}  # the usual bucket would be nearly all there is
    (tmp_path / "zero2.json").write_text(json.dumps(zero2))
    tree = rwkv_tree(tmp_path) | {"deepspeed": {"config": str(tmp_path / "zero2.json")}}
    gc.collect()
    live.claim(others, [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)])
    with live:
        assert worker.measure(validate(tree, "test"), Ranks(0, 0, 1, 1), 1, True, tmp_path / "out.json") == 0
    memory = read(tmp_path / "out.json").memory
    peak_bytes, own_bytes = (peak - left_over[0] for peak in (memory.peak_bytes, peaks[0]))
    assert peak_bytes == pytest.approx(own_bytes, rel=0.02)
    assert memory.at_peak["activations"] > 0.1 * peak_bytes


def test_variants_take_turns(rwkv):
    """Ratios of the second to the first, from each turn's measurements."""
    assert {path.stem for path in (rwkv / "turns").glob("*.json")} == {"1-row-1", "1-row-2", "2-lora-1", "2-lora-2"}
    assert {path.name for path in (rwkv / "configs").iterdir()} == {"1-row.yaml", "2-lora.yaml"}
    row, lora = ([read(rwkv / "turns" / f"{name}-{turn}.json") for turn in (1, 2)] for name in ("1-row", "2-lora"))
    assert [turn.memory is None for turn in (*row, *lora)] == [False, True, False, True]
    assert row[0].trainable_parameters != lora[0].trainable_parameters
    rows = {(line["variant"], line["name"]): line for line in json.loads((rwkv / "rows.json").read_text())["rows"]}
    ratios = sorted(theirs.steps[0].total_s / ours.steps[0].total_s for ours, theirs in zip(row, lora))
    line = rows["lora", "step"]
    assert (line["compared with"], line["ratio lowest"], line["ratio highest"]) == ("row", *map(pytest.approx, ratios))
    assert line["ratio"] == pytest.approx(sum(ratios) / 2) and rows["row", "step"]["ratio"] is None
    assert rows["lora", "live tensors"]["predicted"] == pytest.approx(lora[0].memory.peak_bytes / 2**30, rel=0.1)
    assert (rwkv / "throughput_and_memory.png").exists()


def test_what_lives_between_steps(rwkv):
    """fp32 weights, an adapter and its flat copy or not, and three fp32 values each for masters and moments."""
    tensors = torch.load(rwkv.parent / "model.pth", weights_only=True)
    measured = measurement(rwkv)
    weights = sum(tensor.numel() for tensor in tensors.values()) * 4
    first = {name: sizes[0] for name, sizes in measured.memory.by_component.items()}
    assert first["weights"] == pytest.approx(weights, rel=0.01)
    assert first["optimizer"] == pytest.approx(3 * 4 * measured.trainable_parameters, rel=0.01)
    assert first["adapter"] in (4 * measured.trainable_parameters, 8 * measured.trainable_parameters)
    assert first["activations"] < 0.01 * weights and first["gathered"] == 0


def test_a_rank_of_stage_3_holds_its_share_and_gathers(llama):
    memory = measurement(llama).memory
    tensors = sum(path.stat().st_size for path in (llama.parent / "model").glob("*.safetensors"))
    assert memory.by_component["weights"][0] == pytest.approx(tensors / 2, rel=0.1)
    assert max(memory.by_component["gathered"]) > 0


def test_everything_is_written_and_predicted(llama):
    names = {path.name for path in llama.iterdir()}
    assert names == {"configs", "turns", "report.html", "overview.png", "memory_over_time.png", "memory_by_component.png",
                     "time_by_part.png", "rows.json", "rows.csv"}
    assert not (llama.parent / "run").exists()
    tree = json.loads((llama / "rows.json").read_text())
    assert tree == json.loads((llama.parent / "rows.json").read_text())
    assert tree["provenance"]["ranks"] == 2 and {"torch", "deepspeed"} <= set(tree["provenance"]["versions"])
    lines = list(csv.DictReader((llama.parent / "rows.csv").read_text().splitlines()))
    assert [line["name"] for line in lines] == [row["name"] for row in tree["rows"]]
    rows = {row["name"]: row for row in tree["rows"]}
    assert rows["loss-bearing tokens"]["figure"] > 0 and rows["achieved"]["figure"] > 0
    assert rows["live tensors"]["predicted"] > 0 and rows["resident set"]["predicted"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_writes_its_allocators_history(rwkv, shell, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "run.yaml").write_text((rwkv.parent / "run.yaml").read_text())
    out = tmp_path / "out"
    assert main(["profile", str(tmp_path / "run.yaml"), "--out", str(out), "--steps", "1", "--ranks", "1"]) == 0
    measured = measurement(out)
    assert 0 < measured.memory.peak_bytes <= 1.1 * measured.allocated_bytes <= 1.1 * measured.reserved_bytes
    assert list((out / "turns").glob("*.snapshot.pickle"))
