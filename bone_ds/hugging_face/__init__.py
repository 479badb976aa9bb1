"""Bone for Hugging Face users: `BoneConfig` and `BoneModel`, a method of PEFT's beside its own. Importing this registers it there.

PEFT finds modules, keeps adapters by name, saves, loads and switches them; what a layer computes is `bone_ds.bone`.
"""

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from bone_ds.hugging_face.config import PEFT_TYPE, BoneConfig
from bone_ds.hugging_face.layer import AdaptedLinear
from bone_ds.hugging_face.model import BoneModel
from bone_ds.hugging_face.tuner import BoneTuner

__all__ = ["AdaptedLinear", "BoneConfig", "BoneModel", "BoneTuner"]

# Not register_peft_method, which takes the names of PEFT's own methods alone; it lost this one.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BoneConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BoneTuner
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = BoneTuner.block_name
