"""ONNX Runtime sessions that call themselves CUDA's and run on the CPU: what can be shown of CUDA graphs without a GPU.

As in CUDA's provider, a graph belongs to the thread that captured it. Here no other thread may capture it again, so a
session that is run in another thread than the first fails.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import onnxruntime as ort
from carso.choices import CPU, CUDA

NO_GRAPH = (None, "-1")


class Run(NamedTuple):
    graph: str | None
    outputs: tuple[int, ...]  # where they are
    thread: str  # its name


class CudaOnTheCpu(ort.InferenceSession):
    """A session that calls itself CUDA's, and notes what it is asked for."""

    built: ClassVar[list[dict[str, str]]] = []  # CUDA's options
    runs: ClassVar[list[Run]] = []
    broken: ClassVar[str] = ""  # what does not work: "capture" or "start"

    def __init__(self, graph, options, providers):
        ((_, cuda_options),) = providers
        self.built.append(cuda_options)
        if self.broken == "start" and cuda_options["enable_cuda_graph"] == "1":
            raise RuntimeError("not all nodes are on CUDA")
        super().__init__(graph, options, providers=[CPU])
        self.captured_by = None

    def get_providers(self):
        return [CUDA]

    def run(self, outputs, feeds, options=None):
        self.note(graph_of(options))
        return super().run(outputs, feeds, options)

    def run_with_iobinding(self, binding, options=None):
        super().run_with_iobinding(binding, options)
        self.note(graph_of(options), *(value.data_ptr() for value in binding.get_outputs()))

    def note(self, graph, *outputs):
        thread = threading.current_thread()
        self.runs.append(Run(graph, outputs, thread.name))
        if graph in NO_GRAPH:
            return
        self.captured_by = self.captured_by or thread
        if self.broken == "capture" or self.captured_by is not thread:
            raise RuntimeError("operation not permitted when stream is capturing")


def graph_of(options: ort.RunOptions | None) -> str | None:
    try:
        return options and options.get_run_config_entry("gpu_graph_id")
    except RuntimeError:  # nothing is said of one
        return None


def pretend(put: Callable[[object, str, object], None]) -> None:
    """Have ONNX Runtime build such sessions. `put` is setattr, or a MonkeyPatch's."""
    load, on_the_cpu, bind_output = ctypes.CDLL, ort.OrtValue.ortvalue_from_numpy, ort.IOBinding.bind_output
    put(ort, "get_available_providers", lambda: [CUDA, CPU])
    put(ort, "preload_dlls", lambda: None)
    put(ctypes, "CDLL", lambda name, *options, **named: name == "libcuda.so.1" or load(name, *options, **named))
    put(ort.OrtValue, "ortvalue_from_numpy", lambda array, device: on_the_cpu(array.copy()))
    put(ort.IOBinding, "bind_output", lambda binding, name, device: bind_output(binding, name))
    put(ort, "InferenceSession", CudaOnTheCpu)
    for name, value in (("built", []), ("runs", []), ("broken", "")):
        put(CudaOnTheCpu, name, value)
