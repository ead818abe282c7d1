"""Packaging: `pip install .`; the run-time requirements stand in requirements.txt."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "retinanet/__init__.py").read_text())[1]

setup(
    name="retinanet",
    version=version,
    description="A faithful, readable and fast PyTorch implementation of RetinaNet",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["retinanet"],
    py_modules=["train", "validate", "visualize"],
    python_requires=">=3.10",
    install_requires=(here / "requirements.txt").read_text().split(),
    extras_require={"dev": ["pytest>=8", "pytest-cov>=5", "ruff>=0.9"]},
    entry_points={
        "console_scripts": [
            "retinanet-train = train:main",
            "retinanet-validate = validate:main",
            "retinanet-visualize = visualize:main",
        ]
    },
)
