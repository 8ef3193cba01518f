"""Packaging. Lower bounds are what the tests ran with or what the code needs; constraints.txt holds CI's versions."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = ["pytest>=8", "torch==2.13.0", "ruff>=0.14"]  # PyTorch is the reference of the parity tests, nothing else

setup(
    name="capcur_jax",
    version="0.1.0",
    description="Capability-staged GRPO post-training of Qwen vision-language models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["capcur_jax", "capcur_jax.*"]),
    package_data={"capcur_jax": ["assets/*/*"]},
    install_requires=[
        "absl-py>=2.1",
        "easy-vqa>=1.0",
        "flax>=0.12",
        "grain>=0.2.15",
        "jax>=0.8",
        "jinja2>=3.1",
        "math-verify[antlr4_13_2]>=0.8",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.6",
        "pillow>=11",
        "rich>=13.9",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "transformers>=5.0",
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "test": TEST,
        "notebooks": ["jupyterlab>=4", "nbclient>=0.10", "pandas>=2.2"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
