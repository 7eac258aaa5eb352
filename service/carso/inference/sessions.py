"""The ONNX graphs of a bundle on a device: the only file that knows ONNX Runtime."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

# ONNX Runtime's own wheels report on its use from 1.29 on, unless told not to before the first import
# (https://github.com/microsoft/onnxruntime/pull/27379). Whoever wants that says so in the environment.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from carso.bundle import BOUNDS, FIRST_PASS, SELF_TEST_EPS, VOTE, VOTE_INT8, Bundle, SelfTest
from carso.choices import CPU, CUDA, PRECISIONS, Device, Precision, PrecisionAsked
from carso.inference.abilities import Abilities, Choice, DeviceError
from carso.inference.certificate import unproven
from carso.inference.precision import chosen
from carso.inference.processors import usable_cpus

log = logging.getLogger(__name__)

# How far an intact copy of the graphs may differ from the known answers, which PyTorch gave in float32 on a CPU.
# Scores are those of first passes, which are float32 everywhere: kernels of another processor sum in another order.
SCORE_TOLERANCE = {CPU: 1e-3, CUDA: 1e-3}
# The share of the votes. A vote between two almost equal classes may fall the other way by
VOTE_TOLERANCE: dict[tuple[str, Precision], float] = {
    (CPU, "float32"): 0.02,  # another order of sums
    (CPU, "int8"): 0.10,  # 8-bit operands; random weights are steeper than trained ones, which differ in 0.005 of them
    (CUDA, "float32"): 0.02,  # another order of sums
    (CUDA, "tf32"): 0.05,  # operands of 10 bits, which move scores by about 0.002; 0 of 8192 votes differed on an H200
}

# Margins are bounds on scores, which are larger than probabilities: absolute, and relative to the margin
MARGIN_TOLERANCE = 1e-3

# On CUDA, every new shape makes the arena grow and kernels be chosen again. So batches are padded to a few fixed sizes,
# each of which is run once at the start. On the CPU padding would only cost, and so would binding.
CUDA_BUCKETS = (32, 128, 512, 2048, 8192)

# The run option that says which CUDA graph a run captures or replays; one without a graph says so
# (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#using-cuda-graphs-preview)
GRAPH_ID = "gpu_graph_id"
NO_GRAPH = "-1"


# By default, a run computes every node of the graph, also those that no output which was asked for needs
ONLY_WHAT_IS_ASKED_FOR = ort.RunOptions()
ONLY_WHAT_IS_ASKED_FOR.only_execute_path_to_fetches = True


@dataclass(frozen=True)
class FirstPass:
    """The outputs of the first pass for B images."""

    probabilities: np.ndarray  # [B, classes] float32, the fast path's answer
    codes: np.ndarray  # [B, code] float32, compressed representations


@dataclass(frozen=True)
class BoundedFirstPass(FirstPass):
    """The same, and how far the score of the most probable class is above all others, at least, within some eps."""

    margins: np.ndarray  # [B] float32


class Sessions:
    """The graphs of one bundle, built on one device. Not for use by two threads at once.

    With CUDA graphs, the thread that builds the sessions should be the one that runs them: ONNX Runtime keeps the
    captured graphs of each thread by themselves, and would capture them again in another (docs/gpu.md).
    """

    provider: str  # the execution provider really in use, as the built session tells
    precision: Choice  # of the votes
    unproven: str | None  # why nothing can be proven, and what would change that; None: it can
    cuda_graphs: bool  # whether runs of fixed sizes are replayed from CUDA graphs

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device = "auto",
        precision: PrecisionAsked = "float32",
        threads: int | None = None,
        spin: bool = False,
        buckets: Sequence[int] | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """Build and self-test both sessions.

        `precision` is that of the votes, `auto` as ``carso.inference.precision`` chooses; first passes are always
        float32. `threads` is how many threads ONNX Runtime uses on the CPU; None: one for each processor that this
        process may use. With `spin`, idle threads keep their processors busy for a shorter wake-up. `buckets` are the
        batch sizes to pad to, ascending; larger batches run as they are; None: CUDA_BUCKETS on CUDA, none on the CPU.
        With `cuda_graphs`, CUDA captures a graph of each combination of buckets and replays it. Where that does not
        work, the sessions do without, and the log says why. Raises DeviceError.
        """
        start = partial(self._start, bundle, precision=precision, threads=threads, spin=spin, buckets=buckets)
        if cuda_graphs and device == "cpu":
            log.warning("no CUDA graphs are used: the CPU was asked for")
        elif cuda_graphs:
            try:
                start(device="cuda", cuda_graphs=True)
                return
            except DeviceError as e:
                log.warning("no CUDA graphs are used: %s", e)
        start(device=device, cuda_graphs=False)

    def _start(
        self,
        bundle: Bundle,
        *,
        device: Device,
        precision: PrecisionAsked,
        threads: int | None,
        spin: bool,
        buckets: Sequence[int] | None,
        cuda_graphs: bool,
    ) -> None:
        # a first pass is too small to share out: waking a second thread takes longer
        alone = _options(threads=1, spin=spin)
        first_pass = _build(FIRST_PASS, bundle.first_pass, device, alone, cuda_graphs=cuda_graphs)
        self.provider = _provider(first_pass)
        options = _options(threads=threads or usable_cpus(), spin=spin)
        self.precision = chosen(precision, bundle.recounts, provider=self.provider)
        _check_precision(self.precision.precision, provider=self.provider)
        if self.precision.precision == "int8":
            vote = _build(VOTE_INT8, _int8_graph(bundle), "cpu", options)
        else:
            # what the first session got, the second must get too
            own_device: Device = "cuda" if self.provider == CUDA else "cpu"
            tf32 = self.precision.precision == "tf32"
            vote = _build(VOTE, bundle.vote, own_device, options, tf32=tf32, cuda_graphs=cuda_graphs)
        self.cuda_graphs = cuda_graphs
        self._buckets = tuple((CUDA_BUCKETS if self.provider == CUDA else ()) if buckets is None else buckets)
        self._first_pass, self._vote = (
            _Batches(session, self._buckets, cuda_graphs=cuda_graphs) for session in (first_pass, vote)
        )
        self.unproven = unproven(bundle, provider=self.provider)
        self._bounds = (
            None
            if bundle.bounds is None or self.unproven
            else _build(BOUNDS, bundle.bounds, "cpu", _options(threads=1, spin=spin))
        )
        try:
            self._warm(bundle)
            self._check(bundle, self.precision.precision)
        except DeviceError:
            raise
        except Exception as e:  # ONNX Runtime has a class per status code, and no base of them
            raise DeviceError(
                f"the graphs of bundle {bundle.folder} do not run on {self.provider}: {e}. Export the bundle again, or "
                "look at the device's memory and libraries."
            ) from e

    @property
    def abilities(self) -> Abilities:
        """What an engine with these graphs can do."""
        return Abilities(self.provider, self.precision, self.unproven)

    def first_pass(self, images: np.ndarray) -> FirstPass:
        """Run the first pass on `images` [B, *shape] float32 in the bundle's value range."""
        found = self._first_pass.run(("probabilities", "codes"), {"images": images})
        return FirstPass(*(array[: len(images)] for array in found))

    def first_pass_with_bounds(self, images: np.ndarray, eps: np.ndarray) -> BoundedFirstPass:
        """Run the first pass on `images` [B, *shape], and on every image within `eps` [B] of each, in one run.

        `images` are float32 in the bundle's value range, and `eps` is float32 in units of the values. Where a margin is
        positive, the first pass gives the same label to all those images: docs/certificate.md has the proof. Raises
        DeviceError where nothing can be proven, with what `unproven` says.
        """
        if self._bounds is None:
            raise DeviceError(f"nothing can be proven here: {self.unproven}")
        return BoundedFirstPass(
            *self._bounds.run(["probabilities", "codes", "margins"], {"images": images, "eps": eps})
        )

    def vote(self, codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray) -> np.ndarray:
        """Cast R votes and return their classes [R] int64.

        `codes` [M, code] float32 are those of M images; vote r uses ``codes[code_index[r]]``, with `code_index` [R]
        int64, and the latent ``latents[r]``, with `latents` [R, latent] float32.
        """
        return self._second_pass("votes", codes, code_index, latents)

    def vote_and_purify(
        self, codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray, *, purified: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Do `vote` with all rows but the last `purified` (at least one), and `purify` with those.

        On the CPU this is one run: the purified images of all rows are there anyway. A GPU would copy them all to the
        CPU, which takes longer than a second run of few rows.
        """
        rows = len(latents) - purified
        if self.provider == CPU:
            feeds = {"codes": codes, "code_index": code_index, "latents": latents}
            votes, images = self._vote.run(("votes", "purified"), feeds)
            return votes[:rows], images[rows : len(latents)]
        return (
            self.vote(codes, code_index[:rows], latents[:rows]),
            self.purify(codes[code_index[rows:]], np.arange(purified), latents[rows:]),
        )

    def purify(self, codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray) -> np.ndarray:
        """Return the purified images [R, *shape] float32, in the bundle's value range, that `vote` would classify."""
        return self._second_pass("purified", codes, code_index, latents)

    def _second_pass(self, output: str, codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray) -> np.ndarray:
        feeds = {"codes": codes, "code_index": code_index, "latents": latents}
        return self._vote.run((output,), feeds)[0][: len(latents)]

    def _warm(self, bundle: Bundle) -> None:
        """Run every bucket once, so that no request pays for a first time."""
        manifest = bundle.manifest
        for rows in self._buckets:
            self.first_pass(np.zeros((rows, *manifest.input.shape), np.float32))
            for images in (bucket for bucket in self._buckets if bucket <= rows):
                self.vote(
                    np.zeros((images, manifest.code), np.float32),
                    np.zeros(rows, np.int64),
                    np.zeros((rows, manifest.latent), np.float32),
                )
            for images in {self._buckets[0], rows}:  # an explanation is of one image, all else of one for each row
                self.purify(
                    np.zeros((images, manifest.code), np.float32),
                    np.zeros(rows, np.int64),
                    np.zeros((rows, manifest.latent), np.float32),
                )

    def _check(self, bundle: Bundle, precision: Precision) -> None:
        """The known-answer test."""
        test = bundle.self_test
        score_tolerance, vote_tolerance = SCORE_TOLERANCE[self.provider], VOTE_TOLERANCE[self.provider, precision]
        first = self.first_pass(test.images)
        votes = self.vote(test.codes, test.code_index, test.latents)
        strayed = _strayed(first, test)
        other = float((votes != test.votes).mean())
        if not strayed <= score_tolerance or not other <= vote_tolerance:
            raise DeviceError(
                f"the self-test of bundle {bundle.folder} failed on {self.provider}: in float32, scores are off by "
                f"{strayed:.2g} (at most {score_tolerance}); in {precision}, {other:.1%} of the votes differ (at most "
                f"{vote_tolerance:.0%}). The device or its libraries compute wrongly, or the bundle was exported from "
                "other weights."
            )
        self._check_margins(bundle)
        log.info(
            "self-test passed on %s: scores off by %.1g in float32, %.1f%% of votes differ in %s",
            *(self.provider, strayed, 100 * other, precision),
        )

    def _check_margins(self, bundle: Bundle) -> None:
        test = bundle.self_test
        if self._bounds is None or test.margins is None:
            return
        found = self.first_pass_with_bounds(test.images, np.full(len(test.images), SELF_TEST_EPS, np.float32))
        strayed = _strayed(found, test)
        is_near = np.allclose(found.margins, test.margins, atol=MARGIN_TOLERANCE, rtol=MARGIN_TOLERANCE)
        if not is_near or not strayed <= SCORE_TOLERANCE[CPU]:
            raise DeviceError(
                f"the self-test of bundle {bundle.folder} failed on {self.provider}: margins are off by "
                f"{float(np.abs(found.margins - test.margins).max()):.2g}, and scores by {strayed:.2g}. The device or "
                f"its libraries compute wrongly, or the bundle's {BOUNDS} was exported from other weights."
            )


@dataclass(frozen=True)
class _Bound:
    """A run on batches of fixed sizes: its buffers, and what it is told."""

    binding: ort.IOBinding
    inputs: dict[str, ort.OrtValue]
    options: ort.RunOptions


class _Batches:
    """Runs one session on batches that are padded to fixed sizes, where there are any.

    Of each combination of sizes it keeps the inputs in buffers on the device, which stay where they are (IOBinding), so
    that a run allocates nothing there, and copies no output but those asked for. With CUDA graphs, the outputs stay
    where they are too, because a graph is replayed on the addresses that it was captured with.
    """

    def __init__(self, session: ort.InferenceSession, sizes: Sequence[int], *, cuda_graphs: bool) -> None:
        """`sizes`: ascending; a larger batch runs as it is."""
        self._session = session
        self._sizes = sizes
        self._cuda_graphs = cuda_graphs
        self._device = "cuda" if _provider(session) == CUDA else "cpu"
        self._bound: dict[tuple[object, ...], _Bound] = {}

    def run(self, outputs: tuple[str, ...], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs, of as many rows as the padded inputs have."""
        padded = {name: self._padded(array) for name, array in feeds.items()}
        found: list[np.ndarray]
        if not all(len(array) in self._sizes for array in padded.values()):
            found = self._session.run(list(outputs), padded, self._options(NO_GRAPH))
            return found
        key = (outputs, *(len(array) for array in padded.values()))
        if key not in self._bound:
            self._bound[key] = self._bind(outputs, padded)
        bound = self._bound[key]
        for name, array in padded.items():
            bound.inputs[name].update_inplace(np.ascontiguousarray(array))
        self._session.run_with_iobinding(bound.binding, bound.options)
        found = bound.binding.copy_outputs_to_cpu()
        return found

    def _bind(self, outputs: Iterable[str], feeds: Mapping[str, np.ndarray]) -> _Bound:
        binding = self._session.io_binding()
        inputs = {name: ort.OrtValue.ortvalue_from_numpy(array, self._device) for name, array in feeds.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, self._device if self._cuda_graphs else "cpu")
        if self._cuda_graphs:
            # A run before the capture, in which nothing may be allocated. It also makes the outputs' buffers.
            self._session.run_with_iobinding(binding, self._options(NO_GRAPH))
            made = binding.get_outputs()
            binding.clear_binding_outputs()
            for name, value in zip(outputs, made, strict=True):
                binding.bind_ortvalue_output(name, value)
        # an id is for one combination of shapes and buffers; 0 is ONNX Runtime's own
        return _Bound(binding, inputs, self._options(str(len(self._bound) + 1)))

    def _options(self, graph: str) -> ort.RunOptions:
        """What a run is told: its CUDA graph, if there are any."""
        if not self._cuda_graphs:
            return ONLY_WHAT_IS_ASKED_FOR
        options = ort.RunOptions()
        options.add_run_config_entry(GRAPH_ID, graph)
        return options

    def _padded(self, array: np.ndarray) -> np.ndarray:
        """`array` with rows of zeros up to the next size; row 0 is a code that is always there."""
        rows = next((size for size in self._sizes if size >= len(array)), len(array))
        if rows == len(array):
            return array
        padded = np.zeros((rows, *array.shape[1:]), array.dtype)
        padded[: len(array)] = array
        return padded


def _strayed(found: FirstPass, test: SelfTest) -> float:
    """Return how far scores and codes are off the known answers, at most."""
    return max(
        float(np.abs(found.probabilities - test.probabilities).max()), float(np.abs(found.codes - test.codes).max())
    )


def _provider(session: ort.InferenceSession) -> str:
    return str(session.get_providers()[0])


def _check_precision(precision: Precision, *, provider: str) -> None:
    if precision not in PRECISIONS[provider]:
        raise DeviceError(
            f"votes cannot be cast in {precision} on {provider}: set CARSO_PRECISION to "
            f"{' or '.join(PRECISIONS[provider])}, or choose another CARSO_DEVICE"
        )


def _int8_graph(bundle: Bundle) -> bytes:
    if bundle.vote_int8 is None:
        raise DeviceError(
            f"bundle {bundle.folder} has no {VOTE_INT8}: set CARSO_PRECISION=float32, or export the bundle again"
        )
    return bundle.vote_int8


def _options(*, threads: int, spin: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # both graphs are chains: there is nothing to run side by side
    options.enable_mem_pattern = False  # it keeps a plan for every shape ever seen, and rounds are of every size
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    return options


def _build(
    name: str,
    graph: bytes,
    device: Device,
    options: ort.SessionOptions,
    *,
    tf32: bool = False,
    cuda_graphs: bool = False,
) -> ort.InferenceSession:
    """A session of the graph `name` on `device`; ``auto``: on CUDA, else on the CPU."""
    if device != "cpu":
        try:
            return _build_on_cuda(graph, options, tf32=tf32, cuda_graphs=cuda_graphs)
        except DeviceError as e:
            if device == "cuda":
                raise
            log.info("using the CPU: %s", e)
    try:
        return ort.InferenceSession(graph, options, providers=[CPU])
    except Exception as e:  # ONNX Runtime has a class per status code, and no base of them
        raise DeviceError(f"{name} is not a graph that ONNX Runtime {ort.__version__} can run: {e}") from e


def _build_on_cuda(graph: bytes, options: ort.SessionOptions, *, tf32: bool, cuda_graphs: bool) -> ort.InferenceSession:
    """A session that runs on CUDA and nothing else.

    `get_available_providers` lists what the wheel was compiled for, not what is there, and a session that asks for
    CUDA in vain runs on the CPU without an exception; so the libraries are loaded first, and the built session asked.
    """
    if CUDA not in ort.get_available_providers():
        raise DeviceError(
            "this ONNX Runtime was built without CUDA; install carso[gpu] instead, or set CARSO_DEVICE=cpu"
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise DeviceError(
            "CUDA was asked for, but no NVIDIA driver is installed (libcuda.so.1 is not found). "
            "Check nvidia-smi, give the container a GPU, or set CARSO_DEVICE=cpu"
        ) from None
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN out of the nvidia-* wheels, where they are installed
    cuda_options = {
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "1" if tf32 else "0",  # the provider's own default is 1, whatever was asked for
        "enable_cuda_graph": "1" if cuda_graphs else "0",
    }
    try:
        session = ort.InferenceSession(graph, options, providers=[(CUDA, cuda_options)])
    except Exception as e:  # ONNX Runtime has a class per status code, and no base of them
        raise DeviceError(f"CUDA cannot be used: {e}. Check the driver, or set CARSO_DEVICE=cpu") from e
    if session.get_providers()[0] != CUDA:
        raise DeviceError(
            f"CUDA was asked for, but the session runs on {session.get_providers()[0]}: no usable GPU, driver, CUDA or "
            "cuDNN library was found. Check nvidia-smi, install carso[gpu], or set CARSO_DEVICE=cpu"
        )
    return session
