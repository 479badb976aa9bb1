"""Fine-tunes LLaMA models with Bone (block affine) adapters on DeepSpeed."""

__version__ = "0.1.0"
