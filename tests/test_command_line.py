"""`bone-ds` as a shell runs it: quick where nothing is trained, and two lines at most where the user can mend what is wrong."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import save_tiny

from bone_ds import cli, launch
from bone_ds.bone import adapted_weight
from bone_ds.cli import main
from bone_ds.errors import ConfigError, LostRankError

ROOT = Path(__file__).parents[1]
SIZES = ("--layers", "2", "--width", "32", "--vocab", "256", "--head-size", "8")
HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "numpy")


def shell(*arguments: str, directory: Path) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "bone_ds", *arguments], cwd=directory, capture_output=True, text=True, timeout=300,
        env=environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("arguments, code", [
    ([], 2), (["--help"], 0), (["--version"], 0), (["train", "--help"], 0), (["config"], 0), (["config", "absent.yaml"], 2),
    (["train", "absent.yaml"], 2), (["train", "wrong.yaml", "--ranks", "2"], 2), (["merge", "--help"], 0),
    (["data", "--help"], 0), (["generate", "--help"], 0), (["import", "--help"], 0), (["export", "--help"], 0), (["init", "--help"], 0),
    (["generate", "model.pth", "--prompt", "a", "--top-p", "0.5"], 2), (["init", "rwkv", *SIZES, "--out", "a.pth", "--seed", "-1"], 2),
], ids=str)
def test_quick_answers_import_nothing_heavy(tmp_path, arguments, code):
    (tmp_path / "wrong.yaml").write_text("model: {path: m}\ndata: {trian: a.jsonl}\noutput: {directory: run}\n")
    program = f"""
import sys
from bone_ds.cli import main
try:
    code = main({arguments!r})
except SystemExit as end:
    code = end.code or 0
print([name for name in {HEAVY!r} if name in sys.modules], code, file=sys.stderr)
"""
    before_s = cpu_time_of_children_s()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stderr.splitlines()[-1] == f"[] {code}"
    assert cpu_time_of_children_s() - before_s < 1.0  # half of it on a calm machine; the time on the clock depends on what else runs


def test_output_to_a_full_disk(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["config"]) == 2
    assert capsys.readouterr().err == "bone-ds: a file, or the output of this command: No space left on device\n"


def test_a_missing_config_alone_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


def cpu_time_of_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    save_tiny(directory / "whole")
    save_tiny(directory / "broken")
    config = json.loads((directory / "broken/config.json").read_text())
    (directory / "broken/config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    return directory


@pytest.fixture
def run_directory(tmp_path, model):
    """A directory with everything that a run needs, and a config of two steps on CPU."""
    rows = [{"query": "ab" * n, "response": "cd"} for n in range(1, 9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(f"""
model: {{path: {model}/whole, dtype: fp32}}
adapter: {{rank: 8}}
data: {{train: train.jsonl, max_length: 256}}
train: {{steps: 2, global_batch_size: 2, learning_rate: 1e-3}}
output: {{directory: run}}
""")
    return tmp_path


def refused(directory: Path, *arguments: str) -> str:
    """The message of a run that must be refused and leave nothing behind."""
    before = sorted(directory.rglob("*"))
    done = shell("train", "run.yaml", *arguments, directory=directory)
    assert done.returncode == 2, done.stderr
    message = done.stderr.removesuffix("\n")
    assert done.stdout == "" and message.startswith("bone-ds: ") and message.count("\n") < 2, done.stdout + done.stderr
    assert sorted(directory.rglob("*")) == before
    return message


@pytest.mark.parametrize("arguments, says", [
    (["train.stepz=5"], ["train.stepz", "did you mean 'steps'?"]),
    (["deepspeed.config=ds.json"], ["ds.json: gradient_clipping: 5", "train.max_grad_norm"]),
    (["data.train=[train.jsonl, gone.jsonl]"], ["data.train: gone.jsonl", "no such file"]),
    (["data.eval=gone.jsonl"], ["data.eval: gone.jsonl", "no such file"]),
    (["model.path=./gone"], ["model.path: ./gone", "no such file or directory"]),
    (["model.path=gone.gguf"], ["model.path: gone.gguf", "no such file or directory"]),
    (["model.path=gone.pth"], ["model.path: gone.pth", "no such file or directory"]),
    (["data.train=gone.bin", "data.prompt=text"], ["data.train: gone.bin", "no such file"]),
    (["--resume"], ["--resume", "run holds no run"]),
    (["output.directory=old"], ["output.directory: old", "not empty", "--resume"]),
    (["output.directory=old/notes"], ["output.directory: old/notes", "is a file"]),
    (["output.directory=old/notes/run"], ["output.directory: old/notes/run", "old/notes is no directory"]),
    ([f"output.directory={'x' * 300}"], ["xxx: File name too long"]),
    (["--ranks", "3"], ["train.global_batch_size: 2", "3 ranks"]),
], ids=str)
def test_refused_before_the_launcher(run_directory, arguments, says):
    (run_directory / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 5}')
    (run_directory / "old").mkdir()
    (run_directory / "old/notes").touch()
    ranks = [] if "--ranks" in arguments else ["--ranks", "1"]
    message = refused(run_directory, *ranks, *arguments)
    assert all(part in message for part in says), message


@pytest.mark.parametrize("ranks, change, says", [
    (1, "data.train=bad.jsonl", ["bad.jsonl:2", "not JSON"]),
    (2, "model.path={model}/broken", ["broken", "has shape", "48"]),
    (2, "adapter.rank=12", ["adapter.rank: 12 does not divide", "fit every target: 16, 8"]),
], ids=str)
def test_refused_by_the_ranks(run_directory, model, ranks, change, says):
    (run_directory / "bad.jsonl").write_text('{"query": "a", "response": "b"}\n{"query": "c"\n')
    message = refused(run_directory, "--ranks", str(ranks), change.format(model=model))
    assert all(part in message for part in says), message


def test_two_ranks_train_and_say_nothing_else(run_directory):
    done = shell("train", "run.yaml", "--ranks", "2", directory=run_directory)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["plan:", "model", "train", "warning:", "step", "step", "done", "`bone-ds"], done.stdout
    assert "the longest sample has 158 tokens, the model's context is 64" in lines[3]
    assert "step 2/2" in lines[5] and (run_directory / "run/adapter.safetensors").exists()
    merged = shell("merge", "run/adapter.safetensors", "--out", "merged", directory=run_directory)
    assert (merged.returncode, merged.stderr) == (0, "")
    assert (run_directory / "merged/model.safetensors").exists()


def test_another_grouping_and_form_train_and_merge(run_directory, model):
    done = shell("train", "run.yaml", "--ranks", "1", "adapter.grouping=free", "adapter.groups=2", "adapter.form=hadamard",
                 directory=run_directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert any(line.startswith("step 2/2") for line in done.stdout.splitlines())
    assert main(["merge", str(run_directory / "run/adapter.safetensors"), "--out", str(run_directory / "merged")]) == 0
    base, merged = (load_file(path / "model.safetensors") for path in (model / "whole", run_directory / "merged"))
    bones = load_file(run_directory / "run/adapter.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert bones[f"{name}.bone"].shape == (2, 8, 8) and bones[f"{name}.bone"].abs().max() > 0
    expected = adapted_weight(base[f"{name}.weight"], bones[f"{name}.bone"], "free", "hadamard")
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=0)


def test_a_rank_killed_for_memory_is_explained(run_directory, monkeypatch, capsys):
    monkeypatch.chdir(run_directory)
    monkeypatch.setattr(launch, "start", lambda arguments, ranks: 137)
    assert main(["train", "run.yaml", "--ranks", "1"]) == 137
    message = capsys.readouterr().err
    assert "SIGKILL" in message and "data.max_length" in message and message.count("\n") == 1


@pytest.mark.parametrize("code, has_checkpoint, is_told", [(130, True, True), (143, True, True), (130, False, False), (1, True, False)])
def test_a_stopped_run_says_how_it_goes_on(run_directory, monkeypatch, tmp_path, capsys, code, has_checkpoint, is_told):
    monkeypatch.chdir(run_directory)

    def stop(arguments, ranks):
        if has_checkpoint:
            (tmp_path / "stopped").mkdir()
            (tmp_path / "stopped/adapter.safetensors").touch()
        return code

    monkeypatch.setattr(launch, "start", stop)
    assert main(["train", "run.yaml", "--ranks", "1", f"output.directory={tmp_path}/stopped"]) == code
    message = capsys.readouterr().err
    assert (f"with --resume the run in {tmp_path}/stopped goes on" in message) == is_told and message.count("\n") == is_told


@pytest.mark.parametrize("speaks, hangs", [(True, True), (True, False), (False, True)])
def test_one_rank_says_that_another_is_lost(monkeypatch, capsys, speaks, hangs):
    waited = []

    def lose_a_rank(options, given):
        raise LostRankError("rank 1 does not answer", speaks, hangs)

    monkeypatch.setattr(cli, "_config", lose_a_rank)
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert main(["config"]) == 1
    assert capsys.readouterr().err == ("bone-ds: rank 1 does not answer\n" if speaks else "")
    assert waited == [cli.LAST_WORD_S] * (not hangs) + [cli.LET_SPEAK_S] * (not speaks)


@pytest.mark.parametrize("error", [ConfigError("train.steps: 0"), OSError(28, "No space left on device", "run")], ids=str)
@pytest.mark.parametrize("of_first_rank", [False, True])
def test_what_rank_0_says_for_all_no_other_rank_says(monkeypatch, capsys, error, of_first_rank):
    def fail(options, given):
        raise error

    error.of_first_rank, waited = of_first_rank, []
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "_config", fail)
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert main(["config"]) == 2 and waited == [cli.LET_SPEAK_S]
    assert capsys.readouterr().err.count("bone-ds: ") == (not of_first_rank)


def test_a_new_model(tmp_path, capsys):
    assert main(["init", "rwkv", *SIZES, "--dtype", "fp32", "--seed", "3", "--out", str(tmp_path / "in/a.pth")]) == 0
    assert "a.pth: 2 layers of 32, " in capsys.readouterr().out
    tensors = torch.load(tmp_path / "in/a.pth", weights_only=True)
    assert tensors["emb.weight"].shape == (256, 32) and tensors["blocks.1.ffn.key.weight"].shape == (96, 32)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert main(["init", "rwkv", *SIZES, "--ffn", "40", "--out", str(tmp_path / "b.pth")]) == 0
    other = torch.load(tmp_path / "b.pth", weights_only=True)
    assert other["blocks.1.ffn.key.weight"].shape == (40, 32) and other["emb.weight"].dtype == torch.bfloat16
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "in/a.pth"), "--prompt", "a", "--max-new-tokens", "2", "--ignore-eos"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("change, says", [
    (["--layers", "0"], "layers of a new model is 0"), (["--width", "36"], "width 36 of a new model is no multiple of its head size 8"),
    (["--vocab", "-1"], "vocabulary of a new model is -1"), (["--ffn", "0"], "ffn width of a new model is 0"),
    (["--seed", str(2**63)], "--seed: 9223372036854775808"), (["--out", "here/a.bin"], ".pth"),
    (["--out", "here/old.pth"], "exists already"), (["--out", "here/old.pth/a.pth"], "File exists"),
], ids=str)
def test_a_new_model_that_is_refused(tmp_path, monkeypatch, capsys, change, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/old.pth").touch()
    assert main(["init", "rwkv", *SIZES, "--out", "here/a.pth", *change]) == 2
    output = capsys.readouterr()
    assert output.out == "" and says in output.err and output.err.startswith("bone-ds: ") and output.err.count("\n") == 1, output.err
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["old.pth"]


@pytest.mark.parametrize("error, ends", [
    (OSError(28, "No space left on device", "run/log.txt"), True), (OSError(5, "I/O error"), False)], ids=str)
def test_what_the_system_refuses_is_one_line_if_it_names_a_file(monkeypatch, capsys, error, ends):
    def fail(options, given):
        raise error

    monkeypatch.setattr(cli, "_config", fail)
    if ends:
        assert main(["config"]) == 2
        assert capsys.readouterr().err == "bone-ds: run/log.txt: No space left on device\n"
    else:
        with pytest.raises(OSError, match="I/O error"):
            main(["config"])


@pytest.mark.parametrize("arguments, resume, overrides", [
    ([], False, []), (["--resume"], True, []), (["train.steps=3", "--resume", "--ranks", "2"], True, ["train.steps=3"]),
    (["--resume", "train.steps=3"], True, ["train.steps=3"]), (["--resume", "lr=1/step-3"], Path("lr=1/step-3"), []),
    (["--resume=a.b=1", "train.steps=3"], Path("a.b=1"), ["train.steps=3"]),
    (["--resume", "~/step-3", "train.steps=3", "train.seed=1"], Path.home() / "step-3", ["train.steps=3", "train.seed=1"])])
def test_resume_takes_a_checkpoint_and_no_override(arguments, resume, overrides):
    options = cli._parse(["train", "run.yaml", *arguments])
    assert (options.config, options.resume, options.overrides) == ("run.yaml", resume, overrides)
    if resume is True:
        assert cli._parse(["train", "--resume", "run.yaml", *(word for word in arguments if word != "--resume")]).resume is True


@pytest.mark.parametrize("arguments", [["trian", "a.yaml"], ["train"], ["merge", "a"], ["config", "--rank"], ["generate"],
                                       ["import", "a.pth", "--base", "b.pth", "--out", "c"], ["export", "a", "--to", "trl", "--out", "b"],
                                       ["init", "llama", *SIZES, "--out", "a"], ["generate", "m", "--dtype", "fp16"],
                                       ["train", "a.yaml", "--ranks", "two"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("bone-ds")
