"""Packaging for `pip install .`; pyproject.toml reads the run-time requirements from requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "retinanet/__init__.py").read_text())[1]

setup(
    version=version,
    description="A faithful, readable and fast PyTorch implementation of RetinaNet",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["retinanet", "retinanet.*"]),
    package_data={"retinanet": ["py.typed"], "retinanet.evaluation": ["page/*"]},
    py_modules=["train", "validate", "visualize"],
    python_requires=">=3.10",
    extras_require={
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"],
        "yolo": ["pyyaml>=6"],
        "jpeg": ["torchcodec>=0.16"],
        "dev": [
            "hypothesis>=6.100",
            "playwright>=1.50",
            "pytest>=8",
            "pytest-cov>=5",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
        ],
        "plots": ["matplotlib>=3.8"],
        "tensorboard": ["tensorboard>=2.16"],
        "video": ["av>=14"],
    },
    entry_points={"console_scripts": ["retinanet = retinanet.commands:main"]},
)
