"""Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv:1708.07747): clothes from a shop, in the format of MNIST.

Debian has it as the package ``dataset-fashion-mnist``.
"""

from __future__ import annotations

from pathlib import Path

from carso_training.datasets.files import Folder, Mirror
from carso_training.datasets.idx import read_examples
from carso_training.datasets.spec import DatasetSpec

FASHION_MNIST = DatasetSpec(
    name="fashion-mnist",
    title="Fashion-MNIST",
    classes=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    input_shape=(1, 28, 28),
    mean=0.2860,
    std=0.3530,
    background=0.0,
    expects="One article of a clothes shop, bright (high values) on a black background (low values), upright, in the "
    "centre, filling the image.",
    files={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    sources=(
        Folder(Path("/usr/share/datasets/fashion-mnist"), installed_by="dataset-fashion-mnist"),
        Mirror("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
        Mirror("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"),
    ),
    read=read_examples,
)
