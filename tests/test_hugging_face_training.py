"""BoneModel in a torch loop, with the Hugging Face Trainer and under accelerate, and the pages that show it, as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_llama import save_tiny, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bone_ds import BoneConfig, BoneModel
from bone_ds.cli import main

ROOT = Path(__file__).parents[1]
NAME = "HuggingFaceTB/SmolLM2-135M"

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def blocks_of_code(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory where the pages' model is a tiny one, and there is a text to train on."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / NAME, hidden_size=64, head_dim=16)
    (tmp_path / "train.txt").write_text("".join(f"abc{letter}=cba\n" for letter in "defghijk"), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/adapters.md"])
def test_the_code_of_a_page_runs(workplace, capsys, page):
    shown = blocks_of_code(page, "python")
    assert len(shown) >= 2 and [len(code.strip().split("\n\n")[-1].splitlines()) for code in shown[:2]] == [10, 10]
    space = {}
    for code in shown:
        exec(compile(code, page, "exec"), space)
    for directory in ("adapter", "trained"):
        tensors = load_file(workplace / directory / "adapter_model.safetensors")
        assert len(tensors) == 14 and all(tensor.abs().max() > 0 for tensor in tensors.values())
    assert (workplace / "runs/smollm2/checkpoint-3/adapter_model.safetensors").exists()


def test_the_commands_of_the_page_run(workplace, capsys):
    model = BoneModel(AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32), BoneConfig(r=8, target_modules="all-linear"))
    move(model)
    model.save_pretrained("adapter")
    for command in "".join(blocks_of_code("docs/adapters.md", "bash")).splitlines():
        program, *arguments = shlex.split(command)
        assert program == "bone-ds" and main(arguments) == 0, command
    merged = AutoModelForCausalLM.from_pretrained("merged-by-bone-ds", dtype=torch.float32)
    tokens = torch.arange(3, 20)[None]
    torch.testing.assert_close(merged(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)


def move(model) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)


def rows(count: int = 12) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 90, (count, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(directory, *, dtype=torch.float32, steps=6, **options) -> Trainer:
    config = options.pop("config", BoneConfig(r=8, grouping="row", target_modules="all-linear"))
    arguments = TrainingArguments(
        str(directory), max_steps=steps, save_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **options)
    return Trainer(BoneModel(tiny_model().to(dtype), config), arguments, train_dataset=rows(), eval_dataset=rows(4))


def trained(model: BoneModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


CONFIGS = {
    "miss": {"r": 8}, "bat": {"r": 8, "init_weights": "bat"}, "row": {"r": 8, "grouping": "row"},
    "with a head": {"r": 8, "grouping": "row", "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_checkpoint_holds_no_weight_of_the_base(tmp_path, kind):
    run = trainer(tmp_path, config=BoneConfig(target_modules=["q_proj", "down_proj"], **CONFIGS[kind]), steps=2)
    run.train()
    checkpoint = tmp_path / "checkpoint-2"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= files
    assert not files & {"model.safetensors", "pytorch_model.bin", "config.json"}
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    wanted = {f"base_model.model.model.layers.{layer}.{module}.bone_block"
              for layer in (0, 1) for module in ("self_attn.q_proj", "mlp.down_proj")}
    assert tensors.keys() == wanted | ({"base_model.model.lm_head.weight"} if kind == "with a head" else set())
    run.save_model(str(tmp_path / "last"))
    assert load_file(tmp_path / "last/adapter_model.safetensors").keys() == tensors.keys()
    for name, weight in tiny_model().named_parameters():
        if "proj" not in name and name != "lm_head.weight":
            assert torch.equal(run.model.get_base_model().get_parameter(name), weight)


@pytest.mark.parametrize("kind, dtype", [*((kind, torch.float32) for kind in CONFIGS), ("miss", torch.bfloat16)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, kind, dtype):
    def run() -> Trainer:
        return trainer(tmp_path, dtype=dtype, config=BoneConfig(target_modules="all-linear", **CONFIGS[kind]))

    whole = run()
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    there, here = trained(whole.model), trained(resumed.model)
    assert there.keys() == here.keys() and len(there) >= 14
    assert all(torch.equal(here[name], tensor) and tensor.abs().max() > 0 for name, tensor in there.items())


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss")
    run.train()
    best = BoneModel.from_pretrained(tiny_model(), run.state.best_model_checkpoint, is_trainable=True)
    assert all(torch.equal(tensor, trained(best)[name]) for name, tensor in trained(run.model).items())


def test_recomputation_through_the_trainer_changes_nothing(tmp_path):
    plain, recomputed = trainer(tmp_path / "a", steps=2), trainer(tmp_path / "b", steps=2, activation_checkpointing=True)
    for run in (plain, recomputed):
        run.train()
    assert all(torch.equal(tensor, trained(recomputed.model)[name]) for name, tensor in trained(plain.model).items())


def test_under_accelerate_it_learns_what_it_learns_alone(tmp_path):
    accelerator = Accelerator(cpu=True)
    results = []
    for accelerated in (False, True):
        model = BoneModel(tiny_model(), BoneConfig(r=8, grouping="row", target_modules="all-linear"))
        optimizer = torch.optim.AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), lr=1e-2)
        if accelerated:
            model, optimizer = accelerator.prepare(model, optimizer)
        for row in rows(6):
            loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
            accelerator.backward(loss) if accelerated else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(accelerator.unwrap_model(model) if accelerated else model)
    plain, ours = results
    assert type(ours) is BoneModel
    assert all(torch.equal(tensor, trained(ours)[name]) and tensor.abs().max() > 0 for name, tensor in trained(plain).items())
    ours.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 14
