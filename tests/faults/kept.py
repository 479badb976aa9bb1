"""What a run keeps and is begun from, but for its base: checkpoints, adapters, tokenised data, data, the run directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import tiny_llama
import torch
import yaml

from bone_ds import BoneConfig, BoneModel, adapter_file, checkpoint
from bone_ds.checkpoint import Origin, Snapshot, files, manifest
from bone_ds.config import DataConfig, validate
from bone_ds.data import cache, load_samples
from bone_ds.engine.state import MASTER, MOMENTS
from bone_ds.formats import peft
from bone_ds.run_directory import RunDirectory
from faults.damages import Damage, edit_json, in_turn, of_file, put_in_place, setting, swap, truncate
from faults.subject import Subject, Taken, digest_of
from rwkv_adapters.tokenizer import ByteTokenizer

BASE, ADAPTER = "base", "adapter.safetensors"


def subjects() -> list[Subject]:
    return [Checkpoint(), CheckpointByName(), Adapter(), BoneDirectory(), PeftDirectory(), TokenCache(), Corpus(), Rows(), RunFiles()]


class Checkpoint:
    """Three of one run; `--resume` takes the last whole one."""

    name = "checkpoint"
    last = "checkpoints/step-00000003"

    def __init__(self, data_fingerprint: str = "d" * 16):
        self._data_fingerprint = data_fingerprint

    def write(self, directory: Path) -> None:
        tiny_llama.save_tiny(directory / BASE)
        tiny_llama.random_adapter(directory / BASE, directory / ADAPTER, rank=8)
        header, masters = adapter_file.read(directory / ADAPTER)
        for step in (1, 2, 3):
            moments = {part: {name: tensor * 0.1 * step for name, tensor in masters.items()} for part in MOMENTS}
            parts = {MASTER: {name: tensor + step for name, tensor in masters.items()}} | moments
            self.origin = Origin(header, self._data_fingerprint, "model: {path: base}\n")
            files.write(directory / "checkpoints", Snapshot(step, step, 1, 1.0 / step, parts), self.origin)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in masters.items()}

    def damages(self) -> list[Damage]:
        damages = [damage for name in (*files.FILES, manifest.NAME) for damage in self._of(name)]
        damages += [Damage(f"{name} swapped with step 2's", partial(swap, f"{self.last}/{name}", f"checkpoints/step-00000002/{name}"),
                           says) for name, says in (
            (files.ADAPTER, rf"{files.ADAPTER}: is damaged"), (files.STATE, rf"{files.STATE}: is damaged"),
            (manifest.NAME, f"{manifest.NAME}: is of step 2; it or the directory's name is another's"))]
        damages.append(Damage("the directory swapped with step 1's", partial(swap, self.last, "checkpoints/step-00000001"),
                              f"{manifest.NAME}: is of step 1; it or the directory's name is another's"))
        damages += [Damage(f"manifest's {field} edited", partial(edit_json, f"{self.last}/{manifest.NAME}", setting(**{field: value})),
                           f"{manifest.NAME}: is damaged: its content is not what its sha256 says") for field, value in (
            ("step", 7), ("adam_step", 0), ("base_fingerprint", "0" * 64), ("data_fingerprint", "0" * 16), ("held_out_loss", 0.01),
            ("world_size", 2), ("files", {}), ("format_version", 4), ("sha256", "0" * 64), ("more", 1))]
        damages += [Damage(f"manifest of format {version}, sealed", partial(edit_json, f"{self.last}/{manifest.NAME}", sealing(version)),
                           f"{manifest.NAME}: format_version {version!r} is not 3") for version in (2, 4, "3", None)]
        last_two = (partial(truncate, f"checkpoints/step-0000000{step}/{files.STATE}", False) for step in (2, 3))
        return [*damages, Damage("the last two truncated", in_turn(*last_two), "step-00000002.* it is not whole")]

    def _of(self, name: str) -> list[Damage]:
        if name == manifest.NAME:
            says = f"{name}: is damaged: "
            return of_file(f"{self.last}/{name}", 3, 9, says, says, missing=f"{name}: is missing, the checkpoint is not whole")
        return of_file(f"{self.last}/{name}", 3, 6, f"{name}: has (no|[0-9]+) bytes, its manifest says [0-9]+; it is not whole",
                       f"{name}: is damaged: its content is not what its manifest's sha256 says")

    def use(self, directory: Path) -> Taken:
        found = checkpoint.last_whole(directory / "checkpoints", self.origin)
        earlier = (1, 2) if found.step == 3 else ()
        return Taken(self._digest(found.path), tuple(self._digest(directory / f"checkpoints/step-0000000{step}") for step in earlier))

    def _digest(self, path: Path) -> str:
        read, parts = files.read(path, self._shapes)
        return digest_of(repr((read.step, read.adam_step, read.held_out_loss)), *parts.values())

    def inspected(self, directory: Path) -> list[Path]:
        return [directory / self.last]


def sealing(version: object) -> Callable[[dict], None]:
    """As a program of another version would have written it: its own digest fits."""

    def seal(fields: dict) -> None:
        fields["format_version"] = version
        del fields["sha256"]
        fields["sha256"] = manifest._digest(fields)

    return seal


class CheckpointByName(Checkpoint):
    """`--resume PATH`: there is no other to take."""

    name = "checkpoint by name"

    def damages(self) -> list[Damage]:
        return [damage for damage in super().damages() if "last two" not in damage.name and not damage.name.endswith(tuple("13456789"))]

    def use(self, directory: Path) -> Taken:
        checkpoint.given(directory / self.last, self.origin)
        return Taken(self._digest(directory / self.last))


class Adapter:
    """The adapter of a run, merged."""

    name = "adapter"

    def write(self, directory: Path) -> None:
        tiny_llama.save_tiny(directory / BASE)
        tiny_llama.random_adapter(directory / BASE, directory / ADAPTER, rank=8)
        tiny_llama.save_tiny(directory / "other base", hidden_size=64)
        tiny_llama.random_adapter(directory / "other base", directory / "of another base.safetensors", rank=8)
        torch.save({"a": torch.ones(3)}, directory / "pickle.pth")

    def damages(self) -> list[Damage]:
        no_file = f"{ADAPTER}: is no safetensors file, or a damaged one"
        flipped = (f"{ADAPTER}: (is damaged: its contents are not|is no safetensors file, or a damaged one|has no 'bone_ds' header|"
                   "its 'bone_ds' header is damaged|format_version|its header)")
        return [*of_file(ADAPTER, 6, 15, no_file, flipped, missing=f"{ADAPTER}: no such adapter file"),
                *(Damage(f"{other} in its place", partial(put_in_place, ADAPTER, other), says) for other, says in (
                    ("of another base.safetensors", f"{ADAPTER}: was trained on another base"),
                    (f"{BASE}/model.safetensors", f"{ADAPTER}: has no 'bone_ds' header"), ("pickle.pth", no_file)))]

    def use(self, directory: Path) -> Taken:
        from faults.bases import merged_llama

        return Taken(digest_of(merged_llama(directory / ADAPTER, directory / BASE, directory / "merged")))

    def inspected(self, directory: Path) -> list[Path]:
        return [directory / ADAPTER]


class BoneDirectory:
    """What BoneModel.save_pretrained writes, put on again."""

    name = "BoneModel directory"

    def write(self, directory: Path) -> None:
        model = BoneModel(self._model(), BoneConfig(r=8, grouping="row", form="hadamard", target_modules=["q_proj", "k_proj"]))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(directory / "adapter")

    def _model(self) -> torch.nn.Module:
        return tiny_llama.tiny_model()

    def damages(self) -> list[Damage]:
        weights, config = f"adapter/{peft.WEIGHTS}", f"adapter/{peft.CONFIG}"
        no_file = f"adapter: ({peft.WEIGHTS} is no safetensors file|holds no {peft.WEIGHTS})"
        flipped = f"adapter(/{peft.WEIGHTS}: is damaged|: {peft.WEIGHTS} is no safetensors|: its weights|: holds no tensor|: does not fit)"
        wrong = f"(adapter: (its {peft.CONFIG}|holds no tensor|does not fit|base_model)|{peft.WEIGHTS}: is damaged|{peft.CONFIG})"
        return [*of_file(weights, 4, 15, no_file, flipped), *of_file(config, 3, 15, wrong, wrong),
                *(Damage(f"{field} edited", partial(edit_json, config, setting(**{field: value})), wrong) for field, value in (
                    ("r", 4), ("grouping", "col"), ("form", "affine"), ("target_modules", ["q_proj"]), ("peft_type", "LORA")))]

    def use(self, directory: Path) -> Taken:
        model = BoneModel.from_pretrained(self._model(), directory / "adapter")
        tokens = torch.arange(3, 20)[None]
        with torch.no_grad():
            return Taken(digest_of({"logits": model(input_ids=tokens).logits}))

    def inspected(self, directory: Path) -> list[Path]:
        return [directory / "adapter"]


class PeftDirectory:
    """One for PEFT, imported again."""

    name = "PEFT directory"

    def write(self, directory: Path) -> None:
        tiny_llama.save_tiny(directory / BASE)
        tiny_llama.random_adapter(directory / BASE, directory / ADAPTER, rank=8, grouping="miss")
        peft.export_adapter(directory / ADAPTER, directory / "peft")

    def damages(self) -> list[Damage]:
        weights, config = f"peft/{peft.WEIGHTS}", f"peft/{peft.CONFIG}"
        wrong = f"peft(: |/{peft.WEIGHTS}: is damaged)"
        no_file = f"peft: ({peft.WEIGHTS} is no safetensors file, or a damaged one|holds no {peft.WEIGHTS})"
        no_config = f"peft: (its {peft.CONFIG} is damaged|its {peft.CONFIG} holds|holds no {peft.CONFIG})"
        return [*of_file(weights, 3, 9, no_file, wrong), *of_file(config, 3, 9, no_config, wrong)]

    def use(self, directory: Path) -> Taken:
        peft.import_adapter(directory / "peft", str(directory / BASE), directory / "imported.safetensors")
        header, tensors = adapter_file.read(directory / "imported.safetensors")
        return Taken(digest_of(repr(replace(header, base="")), tensors))

    def inspected(self, directory: Path) -> list[Path]:
        return [directory / "peft"]


class TokenCache:
    """Tokenised data of an earlier start."""

    name = "token cache"

    def write(self, directory: Path) -> None:
        write_rows(directory / "rows.jsonl")
        self._load(directory)
        (place,) = (path for path in (directory / "tokens").iterdir() if path.is_dir())
        self._place = place.relative_to(directory)

    def _load(self, directory: Path):
        before, cache.SMALLEST_BYTES = cache.SMALLEST_BYTES, 0
        try:
            return load_samples(DataConfig(train=(str(directory / "rows.jsonl"),)), ByteTokenizer(), "train", directory)
        finally:
            cache.SMALLEST_BYTES = before

    def damages(self) -> list[Damage]:
        names = ("tokens.npy", "offsets.npy", "learnt.npy", "rows.npy", "manifest.json")
        return [*(damage for name in names for damage in of_file(f"{self._place}/{name}", 2, 5, "", "")),
                Damage("two arrays swapped", partial(swap, f"{self._place}/offsets.npy", f"{self._place}/rows.npy"), "")]

    def use(self, directory: Path) -> Taken:
        samples = self._load(directory)
        (part,) = samples.parts
        digest = digest_of(repr((samples.report, samples.eos_token_id)), samples.tokens, samples.offsets, samples.learnt, samples.rows)
        return Taken(digest, made_anew=not part.was_cached)

    def inspected(self, directory: Path) -> list[Path]:
        return []


class Data:
    """Data in which a run was begun: at --resume it must be the same."""

    field: dict = {}

    def use(self, directory: Path) -> Taken:
        samples = load_samples(DataConfig(train=(str(directory / self.file),), **self.field), ByteTokenizer())
        checkpoint.given(directory / "run" / Checkpoint.last, replace(self._origin, data_fingerprint=samples.fingerprint()))
        return Taken(digest_of(samples.tokens, samples.offsets, samples.learnt))

    def _write_checkpoint(self, directory: Path) -> None:
        samples = load_samples(DataConfig(train=(str(directory / self.file),), **self.field), ByteTokenizer())
        whole = Checkpoint(samples.fingerprint())
        whole.write(directory / "run")
        self._origin = whole.origin

    def inspected(self, directory: Path) -> list[Path]:
        return []


class Corpus(Data):
    """binidx"""

    name, file, field = "binidx", "corpus.bin", {"prompt": "text"}

    def write(self, directory: Path) -> None:
        from test_binidx import write_corpus

        draw = np.random.default_rng(0)
        write_corpus(directory, [draw.integers(1, 256, size).tolist() for size in (40, 3, 700, 120, 9)])
        write_corpus(directory, [draw.integers(1, 256, 300).tolist()], name="other")
        self._write_checkpoint(directory)

    def damages(self) -> list[Damage]:
        tokens = r"(corpus.bin: (holds|is empty|document|there is)|other training samples)"
        index = r"(corpus.idx: |corpus.bin: |other training samples)"
        return [*of_file("corpus.bin", 4, 12, tokens, tokens), *of_file("corpus.idx", 4, 15, index, index),
                *(Damage(f"corpus{ending} of another", partial(put_in_place, f"corpus{ending}", f"other{ending}"),
                         "corpus.bin: holds .* belongs to another index") for ending in (".idx", ".bin"))]


class Rows(Data):
    """.jsonl"""

    name, file = "rows", "rows.jsonl"

    def write(self, directory: Path) -> None:
        write_rows(directory / "rows.jsonl")
        self._write_checkpoint(directory)

    def damages(self) -> list[Damage]:
        says = r"(rows.jsonl(:| )|other training samples)"
        return of_file("rows.jsonl", 5, 15, says, says, empty="rows.jsonl: is empty")


def write_rows(path: Path) -> None:
    rows = [{"query": f"What is {number} and {number}?", "response": f"It is {2 * number}."} for number in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class RunFiles:
    """config.yaml and events.jsonl of a run that is to go on."""

    name = "run directory"

    def write(self, directory: Path) -> None:
        run = RunDirectory(directory / "run")
        run.create(self._config(directory), {"zero_optimization": {"stage": 0}})
        run.record("start", step=0, steps=4, sources=[], model={"fingerprint": "f" * 64})
        for step in (1, 2):
            run.record("step", step=step, loss=1.0 / step)
        run.log.write_text("step 1\nstep 2\n")

    def _config(self, directory: Path):
        return validate({"model": {"path": "base"}, "data": {"train": "rows.jsonl"}, "output": {"directory": str(directory / "run")},
                         "adapter": {"rank": 8}}, "case")

    def damages(self) -> list[Damage]:
        config = r"(run/config.yaml(: |\))|--resume: )"
        return [*of_file("run/config.yaml", 4, 15, config, config, missing="holds no run"),
                *(Damage(damage.name, damage.do, damage.says, True) for damage in of_file("run/events.jsonl", 4, 8, "", ""))]

    def use(self, directory: Path) -> Taken:
        """The config that a run goes on with is the one that is given: of the stored one, only what is compared has a meaning."""
        run = RunDirectory(directory / "run")
        run.check(self._config(directory), True)
        run.create(self._config(directory), {"zero_optimization": {"stage": 0}})
        return Taken(digest_of(yaml.safe_load(run.config.read_text())["adapter"].__repr__()))

    def inspected(self, directory: Path) -> list[Path]:
        return [directory / "run"]
