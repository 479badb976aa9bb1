"""The Bone (block affine) operator; needs torch only. README.md beside this file has equations, groupings, forms and costs."""

from bone_ds.bone.form import FORMS
from bone_ds.bone.grouping import GROUPINGS, bone_shape, fits, largest_common_block
from bone_ds.bone.layer import BoneLinear
from bone_ds.bone.reference import adapted_weight, bone_linear
from bone_ds.bone.strategies import STRATEGIES, resolve

__all__ = [
    "FORMS",
    "GROUPINGS",
    "STRATEGIES",
    "BoneLinear",
    "adapted_weight",
    "bone_linear",
    "bone_shape",
    "fits",
    "largest_common_block",
    "resolve",
]
