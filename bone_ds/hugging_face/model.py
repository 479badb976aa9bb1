"""A model with Bone adapters, in the shape of PEFT's models."""

from __future__ import annotations

import os
import pathlib
import warnings
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from bone_ds import tensor_file
from bone_ds.checksums import stated_in
from bone_ds.errors import BoneError, CheckpointError, ConfigError
from bone_ds.formats import peft as peft_format
from bone_ds.hugging_face.config import BoneConfig
from bone_ds.hugging_face.tuner import BoneTuner, frozen_as_before_on_error

Path = str | os.PathLike


class BoneModel(PeftModel):
    """Any module that holds nn.Linear, with Bone adapters by name; its weights are frozen, attributes it lacks are the module's.

    It is a `PeftModel`: Trainer, accelerate and others treat it as one, `save_pretrained` writes the adapter alone, and
    `disable_adapter`, `set_adapter`, `add_adapter`, `delete_adapter`, `merge_adapter`, `unmerge_adapter`, `merge_and_unload`, `unload` and
    `print_trainable_parameters` are as PEFT's. An adapter of a bf16 or fp16 model is kept in fp32 unless autocast_adapter_dtype=False.

    Raises InjectionError, and leaves the model as it was, where a module can't be adapted.
    """

    def __init__(self, model: nn.Module, config: BoneConfig, adapter_name: str = "default", **kwargs: Any):
        _check_config(config)
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that is no longer the one to use.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            super().__init__(model, config, adapter_name, **kwargs)

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: Path, adapter_name: str = "default", is_trainable: bool = False,
                        config: BoneConfig | None = None, **kwargs: Any) -> BoneModel:
        """The model with an adapter from a directory or the hub: one of this class, of older PEFT's Bone, or of PEFT's MiSS.

        is_trainable: to go on training; else the adapter is frozen too. kwargs: autocast_adapter_dtype, low_cpu_mem_usage, and the hub's
        subfolder, revision, token. Raises CheckpointError, and leaves the model as it was, where the adapter does not fit it.
        """
        if config is None:
            config = _read_config(model_id, cls._split_kwargs(kwargs)[0])
        _check_config(config)
        config.inference_mode = not is_trainable
        made = {name: kwargs[name] for name in ("autocast_adapter_dtype", "low_cpu_mem_usage") if name in kwargs}
        with frozen_as_before_on_error(model):
            adapted = cls(model, config, adapter_name, **made)
            try:
                adapted.load_adapter(model_id, adapter_name, is_trainable, **kwargs)
            except Exception:
                adapted.unload()
                raise
        return adapted

    def save_pretrained(self, save_directory: Path, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; the files state the CRC-32s of their tensors beside, which loading checks."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        for adapter_name, config in self.peft_config.items():
            path = pathlib.Path(save_directory) / ("" if adapter_name == "default" else adapter_name) / peft_format.WEIGHTS
            if path.exists() and not stated_in(path, tensor_file.outline(path)[1]):
                tensors = load_file(path)
                tensor_file.save_file(tensors, path, peft_format.stating(tensors, config.method))

    def add_adapter(self, adapter_name: str, peft_config: BoneConfig, **kwargs: Any) -> None:
        """Adds an untrained adapter; `set_adapter` makes it the active one."""
        _check_config(peft_config)
        super().add_adapter(adapter_name, peft_config, **kwargs)

    def load_adapter(self, model_id: Path, adapter_name: str, is_trainable: bool = False, **kwargs: Any):
        """Adds an adapter from a directory or the hub, or gives the tensors there to one that is present, as when training goes on.

        Raises CheckpointError where it does not fit the model, or is of another method than the one that is present.
        """
        found = _read_config(model_id, self._split_kwargs(kwargs)[0])
        is_new = adapter_name not in self.peft_config
        if is_new:
            self._add_for_loading(adapter_name, found, is_trainable, kwargs)
        else:
            _check_same_method(model_id, found, self.peft_config[adapter_name])
        before = None if is_new else {name: tensor.clone() for name, tensor in self._tensors(adapter_name).items()}
        try:
            return self._load_tensors(model_id, adapter_name, is_trainable, kwargs)
        except Exception:
            if is_new:
                self.delete_adapter(adapter_name)
            else:
                set_peft_model_state_dict(self, before, adapter_name)
            raise

    def _tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """What `save_pretrained` writes of it."""
        return get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)

    def _add_for_loading(self, adapter_name: str, config: BoneConfig, is_trainable: bool, kwargs: dict[str, Any]) -> None:
        config.inference_mode = not is_trainable
        self.add_adapter(adapter_name, config, **{
            name: kwargs[name] for name in ("autocast_adapter_dtype", "low_cpu_mem_usage") if name in kwargs})
        if is_trainable:
            self.set_requires_grad(adapter_name)

    def _load_tensors(self, model_id: Path, adapter_name: str, is_trainable: bool, kwargs: dict[str, Any]):
        path = pathlib.Path(model_id) / (kwargs.get("subfolder") or "")
        if path.is_dir() and not any((path / name).exists() for name in (peft_format.WEIGHTS, "adapter_model.bin")):
            raise CheckpointError(f"{path}: holds no {peft_format.WEIGHTS}")
        if (path / peft_format.WEIGHTS).exists():
            peft_format.check_stated(path, _read_config(model_id, self._split_kwargs(kwargs)[0]).method)
        try:
            result = super().load_adapter(model_id, adapter_name, is_trainable, **kwargs)
        except KeyError as error:
            raise CheckpointError(f"{model_id}: holds no tensor for {error.args[0]}, which its adapter_config.json names") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{model_id}: its weights can't be read: {str(error).splitlines()[0]}") from None
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise CheckpointError(f"{model_id}: does not fit this model: {str(error).splitlines()[1].strip()}") from None
        for name in result.missing_keys:
            raise CheckpointError(f"{model_id}: holds no tensor for {name}, which its adapter_config.json names")
        for name in result.unexpected_keys:
            if name.endswith((BoneTuner.prefix, ".miss_block")):
                raise CheckpointError(f"{model_id}: {name}: this model has no such layer, or the adapter leaves it out")
        for name, tensor in self._tensors(adapter_name).items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{model_id}: {name}: holds NaN or infinite values")
        return result

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The base model's, with gradients for the embedding's output, which reentrant checkpoints need where weights are frozen."""
        base = self.get_base_model()
        # transformers would add a hook at each call.
        if getattr(base, "_require_grads_hooks", None):
            base.disable_input_require_grads()
        base.activation_checkpointing_enable(*args, **kwargs)
        if not getattr(base, "_require_grads_hooks", None):
            self.prepare_model_for_gradient_checkpointing(base)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)


def _read_config(model_id: Path, hub: dict[str, Any]) -> BoneConfig:
    """Raises CheckpointError, which names the directory or the hub's id."""
    try:
        return BoneConfig.from_pretrained(model_id, **hub)
    except (BoneError, ValueError, TypeError, KeyError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{model_id}: its adapter_config.json is not one of Bone or MiSS: {told}") from None


def _check_config(config: PeftConfig) -> None:
    if not isinstance(config, BoneConfig):
        raise ConfigError(f"config: is a {type(config).__name__}, BoneModel takes a BoneConfig")


def _check_same_method(model_id: Path, found: BoneConfig, present: BoneConfig) -> None:
    for field, value in present.method.items():
        if found.method[field] != value:
            raise CheckpointError(f"{model_id}: {field} is {found.method[field]!r}, the model's adapter has {value!r}; load it under a "
                                  "name of its own")
