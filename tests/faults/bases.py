"""Base models in each of their forms, with an adapter that was trained on them: merged and generated from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import tiny_llama
import tiny_rwkv
import torch
from safetensors.torch import load_file
from tiny_rwkv_adapter import random_adapter as random_rwkv_adapter
from torch import Tensor

from bone_ds import generate
from bone_ds.config import ModelConfig
from bone_ds.errors import BoneError
from bone_ds.generate import Loaded
from bone_ds.merge import merge
from faults.damages import Damage, edit_json, flip_within, of_file, put_in_place, setting, swap
from faults.subject import Subject, Taken, digest_of

BASE, ADAPTER, INDEX = "base", "adapter.safetensors", "base/model.safetensors.index.json"
PROMPT = "ABC)DE"
CHANGED = r"(has changed since it was trained: .* holds other bytes|was trained on another base)"
NOT_WHOLE = r"model[-\w]*.safetensors: (is no (whole )?safetensors file|.* but the file has|the tensors end|can't be read)"
HEADER = (r"(safetensors: (is no|the header's entry for|.* starts at byte|.* ends at byte|the tensors end|.* has (shape|dtype)|the tensor "
          r".* is no part|lacks the tensor|lm_head|can't be read)|the weights lack the tensor)")


def subjects() -> list[Subject]:
    return [LlamaDirectory(), LlamaShards(), Rwkv(".pth"), RwkvAlone(".pth"), Rwkv(".safetensors"), Gguf(), ConvertedGguf()]


def computed(loaded: Loaded) -> dict[str, Tensor]:
    """All weights, the tokens of a text, and what the model makes of them."""
    tokens = loaded.tokenizer(PROMPT)["input_ids"] if loaded.architecture.name == "llama" else loaded.tokenizer.encode(PROMPT)
    with torch.no_grad():
        hidden, _ = loaded.architecture.hidden(loaded.model, torch.tensor([tokens]), (len(tokens),))
    return dict(loaded.model.named_parameters()) | {
        "tokens": torch.tensor(tokens), "hidden": hidden, "end": torch.tensor(loaded.tokenizer.eos_token_id)}


def loaded(path: Path, adapter: Path | None = None, **fields: str) -> dict[str, Tensor]:
    return computed(generate.load(ModelConfig(path=str(path), dtype="fp32", **fields), adapter))


def merged_llama(adapter: Path, base: Path, out: Path, cache_dir: Path | None = None) -> dict[str, Tensor]:
    merge(adapter, out, str(base), cache_dir and str(cache_dir))
    return loaded(out)


class _Base:
    """Merged, and put on in memory: both refuse a base, or neither."""

    def use(self, directory: Path) -> Taken:
        fields = {} if self.name.startswith("llama") else self.fields(directory)
        tries = [lambda: self.merged(directory), lambda: loaded(self.base(directory), directory / ADAPTER, **fields)]
        found, errors = [], []
        for one in tries:
            try:
                found.append(one())
            except BoneError as error:
                errors.append(error)
        assert not (found and errors), f"one way refuses it, the other takes it: {errors[0]}"
        assert not list(directory.glob("merged*")) or not errors, "a refused merge leaves something"
        if errors:
            raise errors[0]
        return Taken(digest_of(*found))

    def base(self, directory: Path) -> Path:
        return directory / BASE

    def merged(self, directory: Path) -> dict[str, Tensor]:
        return merged_llama(directory / ADAPTER, self.base(directory), directory / "merged")

    def fields(self, directory: Path) -> dict[str, str]:
        return {}

    def inspected(self, directory: Path) -> list[Path]:
        return [self.base(directory), directory / ADAPTER]


class LlamaDirectory(_Base):
    """One file of weights."""

    name = "llama"

    def write(self, directory: Path) -> None:
        tiny_llama.save_tiny(directory / BASE)
        tiny_llama.random_adapter(directory / BASE, directory / ADAPTER, rank=8)

    def damages(self) -> list[Damage]:
        weights, config = f"{BASE}/model.safetensors", f"{BASE}/config.json"
        wrong_config = rf"(config.json: |{HEADER}|{CHANGED}|tokenizer)"
        edits = (("num_attention_heads", 2), ("rms_norm_eps", 1e-3), ("num_hidden_layers", 10**9), ("num_hidden_layers", 1),
                 ("tie_word_embeddings", True), ("model_type", "gpt2"))
        wrong_tokenizer = rf"(tokenizer.json|holds no tokenizer|its tokenizer can't be loaded|{CHANGED})"
        return [*of_file(weights, 4, 12, NOT_WHOLE, rf"({HEADER}|{CHANGED})", missing="holds neither model.safetensors nor"),
                *(Damage(f"flipped in the middle of the embedding {number}",
                         partial(flip_within, weights, partial(middle_of_embedding, weights)), "holds other bytes") for number in range(5)),
                *of_file(config, 3, 12, wrong_config, wrong_config),
                *of_file(f"{BASE}/tokenizer.json", 2, 8, wrong_tokenizer, wrong_tokenizer),
                *(Damage(f"config's {field} {value}", partial(edit_json, config, setting(**{field: value})), wrong_config)
                  for field, value in edits)]


def middle_of_embedding(file: str, directory: Path) -> bytes:
    """What no sample of the tensor's first and last bytes sees."""
    content = load_file(directory / file)["model.embed_tokens.weight"].numpy().tobytes()
    return content[5000:-5000]


class LlamaShards(_Base):
    """Several files and an index."""

    name = "llama in shards"

    def write(self, directory: Path) -> None:
        tiny_llama.save_tiny(directory / BASE, max_shard_size="20KB")
        tiny_llama.random_adapter(directory / BASE, directory / ADAPTER, rank=8)
        shutil.copyfile(self._shards(directory)[0], directory / "outside.safetensors")
        self._names = [str(path.relative_to(directory)) for path in self._shards(directory)]

    def _shards(self, directory: Path) -> list[Path]:
        return sorted((directory / BASE).glob("*.safetensors"))

    def damages(self) -> list[Damage]:
        flipped, index = rf"({HEADER}|{CHANGED})", rf"(index.json: |{HEADER}|model-[^:]*: can't be read: No such file)"
        return [*(damage for name in self._names[:3] for damage in of_file(name, 2, 5, NOT_WHOLE, flipped)),
                *of_file(INDEX, 3, 10, "index.json: ", index, missing="holds neither model.safetensors nor"),
                *(Damage(f"shards swapped {number}", partial(swap, self._names[0], self._names[number]), "lacks the tensor .* that")
                  for number in (1, 2)),
                Damage("a shard in another's place", partial(put_in_place, self._names[0], self._names[1]), "lacks the tensor"),
                *(Damage(f"index points to {kind}", partial(self._point, to), says) for kind, to, says in (
                    ("another shard", lambda directory: Path(self._names[1]).name, "lacks the tensor .* that .* places there"),
                    ("the directory above", lambda directory: "../outside.safetensors", "not in a file of this directory"),
                    ("an absolute path", lambda directory: str(directory / "outside.safetensors"), "not in a file of this directory"),
                    ("the directory itself", lambda directory: ".", "(not in a file of this directory|can't be read)"),
                    ("nothing", lambda directory: "", "(not in a file of this directory|can't be read)"),
                    ("no text", lambda directory: 7, "not in a file of this directory")))]

    def _point(self, to: Callable[[Path], object], directory: Path, draw: Random) -> None:
        first = Path(self._names[0]).name

        def point(fields: dict) -> None:
            name = next(name for name, file in fields["weight_map"].items() if file == first)
            fields["weight_map"][name] = to(directory)

        edit_json(INDEX, point, directory, draw)


class Rwkv(_Base):
    """A file in one of its two forms."""

    def __init__(self, ending: str):
        self.name, self._file = f"rwkv {ending}", f"{BASE}{ending}"

    def write(self, directory: Path) -> None:
        tiny_rwkv.save_tiny(directory / self._file, vocabulary=256)
        random_rwkv_adapter(directory / self._file, directory / ADAPTER, rank=8)
        tiny_rwkv.save_tiny(directory / f"other{self._file}", seed=1, vocabulary=256)

    def base(self, directory: Path) -> Path:
        return directory / self._file

    def fields(self, directory: Path) -> dict[str, str]:
        return {"tokenizer": "bytes", "wkv": "naive"}

    def merged(self, directory: Path) -> dict[str, Tensor]:
        out = directory / f"merged{Path(self._file).suffix}"
        merge(directory / ADAPTER, out, str(directory / self._file))
        return loaded(out, **self.fields(directory))

    def damages(self) -> list[Damage]:
        says = rf"({self._file}: |{CHANGED})"
        not_whole = rf"{self._file}: (is (cut off|empty|damaged|no)|torch can't read it)"
        return [*of_file(self._file, 6, 30, not_whole, says, missing=rf"{self._file}: there is no such file"),
                Damage("another model in its place", partial(put_in_place, self._file, f"other{self._file}"), CHANGED)]


class RwkvAlone(Rwkv):
    """A .pth, without any adapter: its archive alone tells."""

    def __init__(self, ending: str):
        super().__init__(ending)
        self.name = f"rwkv {ending} alone"

    def use(self, directory: Path) -> Taken:
        return Taken(digest_of(loaded(self.base(directory), **self.fields(directory))))

    def damages(self) -> list[Damage]:
        return [damage for damage in super().damages() if "another model" not in damage.name]


class Gguf(_Base):
    """One file, converted on the way."""

    name = "gguf"

    def write(self, directory: Path) -> None:
        tiny_llama.write_gguf(directory / "base.gguf", tiny_llama.tiny_model())
        source = tiny_llama.opened(directory / "base.gguf", cache_dir=str(directory / "cache"), dtype="fp32")
        tiny_llama.random_adapter(source.path, directory / ADAPTER, rank=8)
        shutil.rmtree(directory / "cache")

    def base(self, directory: Path) -> Path:
        return directory / "base.gguf"

    def fields(self, directory: Path) -> dict[str, str]:
        return {"cache_dir": str(directory / "cache")}

    def merged(self, directory: Path) -> dict[str, Tensor]:
        return merged_llama(directory / ADAPTER, self.base(directory), directory / "merged", directory / "cache")

    def damages(self) -> list[Damage]:
        says = rf"(base.gguf: |{CHANGED})"
        return of_file("base.gguf", 6, 45, r"base.gguf: (is no whole GGUF file|.*)", says, missing="base.gguf")


class ConvertedGguf(Gguf):
    """What an earlier start has converted, without any adapter: the files state what they hold."""

    name = "gguf converted"

    def write(self, directory: Path) -> None:
        tiny_llama.write_gguf(directory / "base.gguf", tiny_llama.tiny_model())
        self._converted = str(self._source(directory).relative_to(directory))

    def _source(self, directory: Path) -> Path:
        return tiny_llama.opened(self.base(directory), cache_dir=str(directory / "cache"), dtype="fp32").path

    def use(self, directory: Path) -> Taken:
        return Taken(digest_of(loaded(self.base(directory), **self.fields(directory))))

    def damages(self) -> list[Damage]:
        weights, = (f"{self._converted}/model-00001-of-00001.safetensors",)
        return of_file(weights, 3, 15, NOT_WHOLE, rf"({HEADER}|is damaged: .* has not the CRC-32|is damaged: its bone_ds_crc32)")
