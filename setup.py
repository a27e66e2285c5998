from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

CHAT_MODEL = ["gguf>=0.17", "filelock>=3.12"]  # what `make chat` fetches its model with
CONSTRAINTS = ["llguidance>=1.9,<2"]
SERVER = [
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "httptools>=0.6",
    "uvloop>=0.19; sys_platform != 'win32'",
    "prometheus_client>=0.20",
]
# Clients of the server's protocols, which its tests run.
CLIENTS = [
    "openai>=2",
    "anthropic>=1",
    "langchain-openai>=1",
    "httpx>=0.27",
    "schemathesis>=4",
    "opentelemetry-sdk>=1.30",
]
LM_EVAL = ["lm_eval>=0.4.13"]
NOTEBOOK = ["ipykernel>=6.29", "matplotlib>=3.8", "nbclient>=0.10"]

# The kernel sources are in `cuda/`, where readers look for them, and are installed as the package `exl._cuda`. `cuda/`
# must not have an __init__.py: in the repository's root it would shadow NVIDIA's `cuda` namespace, which CuPy imports.
setup(
    name="exl-engine",
    version="0.1.0",
    description="exl runs GPTQ-quantized language models from Python on the GPUs people own, in the least memory",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["exl", "exl.*"]), "exl._cuda"],
    package_dir={"exl._cuda": "cuda"},
    package_data={
        "exl": ["py.typed", "assets/*/*", "server/page/*"],
        "exl._cuda": ["*.cu", "include/exl/*.cuh"],
    },
    install_requires=[
        "torch>=2.4",
        "safetensors>=0.4",
        "tokenizers>=0.20",
        "numpy>=1.26",
        "jinja2>=3.1.6",
        "huggingface_hub>=0.25",
        "typer>=0.12",
        "rich>=13",
        "prompt_toolkit>=3.0.40",
        "wcwidth>=0.3",
        # Compiles kernels for the CPU at run time. Names of intrinsics change between versions of LLVM.
        "llvmlite>=0.50,<0.51",
    ],
    extras_require={
        "cuda12": ["cupy-cuda12x[ctk]>=13.6"],
        "cuda13": ["cupy-cuda13x[ctk]>=13.6"],
        "constraints": CONSTRAINTS,
        "demo": ["gradio>=6"],
        "server": SERVER,
        # Runs the demo in the system's Chromium; downloads no browser.
        "browser": ["playwright>=1.50"],
        "chat-model": CHAT_MODEL,
        "lm-eval": LM_EVAL,
        "notebook": NOTEBOOK,
        "test": [
            *CHAT_MODEL,
            *CONSTRAINTS,
            *LM_EVAL,
            *NOTEBOOK,
            *SERVER,
            *CLIENTS,
            "accelerate>=1",  # without which lm_eval's own model for transformers does not import
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "transformers>=4.57",
            "ruff>=0.6",
            "mypy>=1.11",
            "pexpect>=4.9",
            # Only compiler and disassembler: tests compile kernels without a GPU and without CuPy.
            # Users may have NVRTC of CUDA 12 or 13, so tests use both; they install into different folders.
            "nvidia-cuda-nvrtc-cu12>=12.9,<13; sys_platform == 'linux'",
            "nvidia-cuda-nvrtc>=13; sys_platform == 'linux'",
            "nvidia-cuda-nvdisasm>=13; sys_platform == 'linux'",
        ],
    },
    entry_points={"console_scripts": ["exl = exl.cli:main"]},
    classifiers=["Programming Language :: Python :: 3"],
)
