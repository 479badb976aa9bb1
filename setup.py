from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent


class BuildKernel(build_ext):
    """The C kernel is a library that is called through addresses, no Python module."""

    def build_extension(self, ext):
        if self.compiler.compiler_type != "msvc":
            ext.extra_compile_args = ["-O3", "-fopenmp-simd"]
        super().build_extension(ext)

    def get_export_symbols(self, ext):
        return ext.export_symbols  # PyInit_kernel does not exist


setup(
    name="bone_ds",
    version="0.1.0",
    description="Fine-tune RWKV6 and LLaMA models with Bone (block affine) adapters on DeepSpeed ZeRO",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["bone_ds", "bone_ds.bone", "bone_ds.checkpoint", "bone_ds.data", "bone_ds.demo", "bone_ds.engine", "bone_ds.formats",
              "bone_ds.hugging_face", "bone_ds.inspection", "bone_ds.plan", "bone_ds.profile", "llama_adapters", "rwkv_adapters",
              "rwkv_adapters.wkv6", "ds_configs"],
    package_data={"ds_configs": ["*.json"], "bone_ds": ["recipes/*.yaml"], "bone_ds.bone": ["README.md"],
                  "bone_ds.profile": ["page.html.jinja"],
                  "bone_ds.demo": ["*.pth", "MODEL_CARD.md"]},
    # The ranges that the test suite has run on.
    install_requires=[
        "torch>=2.13,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23,<5.24",
        "datasets>=5.2,<5.3",
        "safetensors>=0.8,<0.9",
        "sentencepiece>=0.2.3,<0.3",
        "gguf>=0.19,<0.20",
        "peft>=0.21.2,<0.22",
        "rwkv>=0.8.32,<0.9",
        "pydantic>=2.14,<3",
        "PyYAML>=6.0.3,<7",
        "matplotlib>=3.10,<4",
        # What those bring along anyway and the code names itself.
        "filelock>=3,<5",
        "huggingface_hub>=2.4,<3",
        "jinja2>=3.1,<4",
        "numpy>=2.4,<3",
        "pyarrow>=26,<27",
    ],
    # Optional: without a C compiler, installation goes on and RWKV6 runs in plain torch.
    ext_modules=[Extension("rwkv_adapters.wkv6.kernel", ["rwkv_adapters/wkv6/kernel.c"], optional=True)],
    cmdclass={"build_ext": BuildKernel},
    extras_require={"gpu": ["fla-core>=0.6,<0.7", "triton>=3.3"],
                    "test": ["pytest>=9.2,<10", "pytest-xdist>=3.8,<4", "hypothesis>=6.170,<7", "tensorboard>=2.21,<3"]},
    entry_points={"console_scripts": ["bone-ds = bone_ds.cli:main"]},
)
