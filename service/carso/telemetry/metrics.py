"""The metrics of the service, for Prometheus: seconds and counts; histograms, never summaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal, get_args

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from carso.board.whole import Part, Whole
from carso.bundle import Bundle
from carso.choices import CUDA, Device, PathName
from carso.inference.abilities import Abilities
from carso.inference.admission import Admission
from carso.inference.jobs import Ending, Outcome, Result, Spared, Step
from carso.inference.thinning import Choice, Reason
from carso.telemetry.cgroup import Cgroup
from carso.telemetry.gpus import Gpus
from carso.telemetry.registries import Registries
from carso.version import __version__

# These are gauges beside every counter that tell when it began: half a page that nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

# from a fast answer on a GPU to a full count on a busy CPU
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
ROWS = tuple(2**n for n in range(17))
Stage = Literal["decode", "queue", "first_pass", "vote"]
Cancelled = Literal["client_gone", "deadline", "stopping"]

VOTES = (9, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256, 512, 768, 1024, 1500, 2048, 4096, 10_000)


class Metrics:
    """Counts what the service does. `step` is called on the engine's thread, all else on the event loop's.

    Of a service with workers, each worker counts what it does itself, and each shows the whole. docs/metrics.md says
    what each series means.
    """

    def __init__(
        self,
        bundle: Bundle,
        abilities: Abilities,
        *,
        device: Device,
        whole: Whole | None = None,
        registries: Registries | None = None,
    ) -> None:
        """`abilities`: of the engine that runs the bundle. `device`: what was asked for. `whole` and `registries`:
        those of the service that is shown; None: this process is alone.
        """
        self._whole = whole or Whole()
        registries = registries or Registries.alone()
        self._registry, registry = registries.shown, registries.counting
        self._counter, self._counting, histogram = registries.counter, registries.counting, registries.histogram
        self._requests = self._counter(
            "carso_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )
        self._duration = histogram(
            "carso_request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            ["endpoint", "status"],
            buckets=SECONDS,
            registry=registry,
        )
        self._refusals = self._counter(
            "carso_rejections", "Requests that got an error, by its name.", ["reason"], registry=registry
        )
        self._callers: tuple[Counter, Counter] | None = None
        self._series: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        stages = histogram(
            "carso_stage_duration_seconds",
            "Of requests that got an answer: decode (body to array), queue (until the first pass), first_pass, vote.",
            ["path", "stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._stages = {
            (path, stage): stages.labels(path, stage) for path in get_args(PathName) for stage in get_args(Stage)
        }
        cancellations = self._counter(
            "carso_cancellations", "Requests whose work was ended before its time.", ["reason"], registry=registry
        )
        self._cancellations = {reason: cancellations.labels(reason) for reason in get_args(Cancelled)}
        saved = self._counter("carso_votes_saved", "Votes asked for and not cast.", ["reason"], registry=registry)
        self._saved = {reason: saved.labels(reason) for reason in get_args(Spared)}
        self._rounds = self._counter("carso_rounds", "Rounds of votes.", registry=registry)
        self._round_rows = histogram("carso_round_rows", "Votes of one round.", buckets=ROWS, registry=registry)
        self._round_duration = histogram(
            "carso_round_duration_seconds", "Of one round of votes.", buckets=SECONDS, registry=registry
        )
        self._images = self._counter("carso_first_pass_images", "Images that had their first pass.", registry=registry)
        self._votes = histogram("carso_votes_per_image", "Votes cast per image.", buckets=VOTES, registry=registry)
        elections = self._counter(
            "carso_elections", "Elections by the rule that ended them.", ["rule"], registry=registry
        )
        self._elections = {ending: elections.labels(ending) for ending in get_args(Ending)}
        agreement = self._counter(
            "carso_path_agreement",
            "Images by whether fast and robust path gave the same label; a rise in disagreement may be an attack.",
            ["agree"],
            registry=registry,
        )
        self._agreement = {agree: agreement.labels(str(agree).lower()) for agree in (False, True)}
        typical = self._counter(
            "carso_typical_images",
            "Images by whether they are like those that the bundle knows; others get labels that mean little.",
            ["path", "typical"],
            registry=registry,
        )
        self._typical = {
            (path, is_typical): typical.labels(path, str(is_typical).lower())
            for path in get_args(PathName)
            for is_typical in (False, True)
        }
        near = self._counter(
            "carso_near_duplicate_images",
            "Images by whether they are nearly one that the same caller sent before; many may be an attack by queries.",
            ["path", "near_duplicate"],
            registry=registry,
        )
        self._near = {
            (path, is_near): near.labels(path, str(is_near).lower())
            for path in get_args(PathName)
            for is_near in (False, True)
        }
        self._near_of_callers: Counter | None = None
        certified = self._counter(
            "carso_certified_images",
            "Images of which a proof was asked, by whether every image within eps has their label from the first pass.",
            ["path", "certified"],
            registry=registry,
        )
        self._certified = {
            (path, is_certified): certified.labels(path, str(is_certified).lower())
            for path in get_args(PathName)
            for is_certified in (False, True)
        }
        shadow = self._counter(
            "carso_shadow_images",
            "Images of the fast path that were drawn to be counted while the engine is idle, by what came of it.",
            ["outcome"],
            registry=registry,
        )
        self._shadow = {outcome: shadow.labels(outcome) for outcome in ("agree", "disagree", "dropped")}
        frames = self._counter(
            "carso_stream_frames",
            "Answers to frames of streams: fast, robust, or an error.",
            ["answer"],
            registry=registry,
        )
        self._frames = {answer: frames.labels(answer) for answer in ("fast", "robust", "error")}
        chosen = self._counter(
            "carso_stream_frames_chosen",
            "Frames by what chose them for the robust answer, and whether the budget had votes for it.",
            ["reason", "counted"],
            registry=registry,
        )
        self._chosen = {
            (reason, counted): chosen.labels(reason, str(counted).lower())
            for reason in get_args(Reason)
            for counted in (False, True)
        }
        build = Gauge(
            "carso_build_info",
            "1; the labels say what is running.",
            ["version", "bundle", "bundle_version", "checksum", "device", "provider", "precision"],
            registry=self._registry,
        )
        manifest = bundle.manifest
        provider, precision = abilities.provider, abilities.precision.precision
        build.labels(__version__, manifest.name, manifest.version, bundle.checksum, device, provider, precision).set(1)
        if provider == CUDA and (gpus := Gpus.find()):
            self._registry.register(gpus)
        if cgroup := Cgroup.find():
            self._registry.register(cgroup)

    def watch(
        self,
        *,
        admission: Mapping[PathName, Admission],
        is_ready: Callable[[], bool],
    ) -> None:
        """Show at every scrape what each path owes, how many requests it has, and whether the service is ready."""
        ready = Gauge(
            "carso_ready", "1: send requests; 0: draining, or the engine dead or stuck.", registry=self._registry
        )
        ready.set_function(lambda: float(is_ready()))
        rows, limit, wait, pace, jobs = (
            Gauge(f"carso_{name}", text, ["path"], registry=self._registry)
            for name, text in {
                "queue_rows": "Rows of work owed: images x samples, or 64 an image, less what is done or spared.",
                "queue_limit_rows": "Rows of work that may be owed; beyond that, requests get 429.",
                "estimated_wait_seconds": "Until the rows owed are done, at the measured pace.",
                "rows_per_second": "The measured pace: rows of work done or spared per second of the engine's work.",
                "in_flight_requests": "Requests that the engine has.",
            }.items()
        )
        for path, owed in admission.items():
            limit.labels(path).set(owed.limit)
            rows.labels(path).set_function(partial(getattr, owed, "owed"))
            wait.labels(path).set_function(partial(getattr, owed, "wait"))
            pace.labels(path).set_function(partial(getattr, owed, "pace"))
            jobs.labels(path).set_function(partial(getattr, owed, "jobs"))

    def watch_canary(self, ratio: Callable[[], float]) -> None:
        """Show at every scrape how many of the bundle's own samples are answered rightly."""
        gauge = Gauge(
            "carso_canary_correct_ratio",
            "Share of the bundle's samples, once answered rightly, that still are; NaN before the first.",
            registry=self._registry,
        )
        gauge.set_function(ratio)

    def refusal(self, error: str) -> None:
        """Count an error by its name, of which there are as many as classes in carso.errors."""
        self._refusals.labels(error).inc()

    def request(self, *, endpoint: str, status: int, seconds: float) -> None:
        """Count one answer, `seconds` after its request arrived."""
        requests, duration = self._of_endpoint(endpoint, status)
        requests.inc()
        duration.observe(seconds)

    def caller(self, name: str, *, status: int, rows: int) -> None:
        """Count one answer to a caller that has a key, and the rows of work that it was charged for."""
        requests, work = self._by_caller()
        requests.labels(name, status).inc()
        work.labels(name).inc(rows)

    def caller_rows(self, name: str, rows: int) -> None:
        """Count rows of work that a caller was charged for, while its request goes on."""
        self._by_caller()[1].labels(name).inc(rows)

    def watch_streams(self, open_streams: Part) -> None:
        """Show at every scrape how many streams are open."""
        gauge = Gauge("carso_streams", "Streams that are open.", registry=self._registry)
        gauge.set_function(lambda: sum(open_streams.each()))

    def frame(self, answer: Literal["fast", "robust", "error"], choice: Choice | None) -> None:
        """Count an answer to a frame of a stream, and with its fast one what chose the frame."""
        self._frames[answer].inc()
        if answer == "fast" and choice is not None:
            for reason in choice.why:
                self._chosen[reason, choice.counted].inc()

    def shadowed(self, outcome: Outcome, agrees: bool) -> None:
        """Observe the count of an image that only asked for the fast path."""
        self._shadow["agree" if agrees else "disagree"].inc()
        self.elections([outcome], agree=[agrees])

    def shadow_dropped(self) -> None:
        """Count such an image that was drawn and could not be counted."""
        self._shadow["dropped"].inc()

    def cancellation(self, reason: Cancelled) -> None:
        """Count a request whose work was ended before its time."""
        self._cancellations[reason].inc()

    def result(self, path: PathName, result: Result, *, decode: float) -> None:
        """Observe the stages of a finished job. `decode`: seconds."""
        stages, times = self._stages, result.times
        stages[path, "decode"].observe(decode)
        stages[path, "queue"].observe(times.started - times.submitted)
        stages[path, "first_pass"].observe(times.first_pass_done - times.started)
        if path == "robust":
            stages[path, "vote"].observe(times.finished - times.first_pass_done)

    def elections(self, outcomes: Iterable[Outcome], *, agree: Iterable[bool], sampled: bool = True) -> None:
        """Observe the elections of a finished job, and whether each agrees with the fast path.

        `sampled`: False for images that were chosen for what they show, on which the paths disagree more often.
        """
        for outcome, agrees in zip(outcomes, agree, strict=True):
            self._elections[outcome.ending].inc()
            if outcome.ending == "certificate":  # nothing was voted on: no votes to count, and no second path to agree
                continue
            self._votes.observe(outcome.votes)
            if sampled:
                self._agreement[agrees].inc()

    def typical(self, path: PathName, typical: Iterable[bool]) -> None:
        """Count images by whether they are typical."""
        for is_typical in typical:
            self._typical[path, is_typical].inc()

    def near_duplicate(self, path: PathName, near: bool, *, caller: str | None) -> None:
        """Count an image by whether it is nearly an earlier one. `caller`: as of `elections`."""
        self._near[path, near].inc()
        if near and caller is not None:
            if self._near_of_callers is None:  # without keys, there is no such series
                self._near_of_callers = self._counter(
                    "carso_caller_near_duplicates",
                    "Images that are nearly an earlier one, by key.",
                    ["caller"],
                    registry=self._counting,
                )
            self._near_of_callers.labels(caller).inc()

    def certified(self, path: PathName, certified: Iterable[bool]) -> None:
        """Count images of which a proof was asked, by whether there is one."""
        for is_certified in certified:
            self._certified[path, is_certified].inc()

    def step(self, step: Step) -> None:
        """Count what one step of the engine did."""
        if step.first_passes:
            self._images.inc(step.first_passes)
        if step.rows:
            self._rounds.inc()
            self._round_rows.observe(step.rows)
            self._round_duration.observe(step.seconds)
        for reason, votes in step.spared.items():
            self._saved[reason].inc(votes)

    def _by_caller(self) -> tuple[Counter, Counter]:
        """Return the counters of requests and of work by key. Without keys, there are no such series."""
        if self._callers is None:
            requests = self._counter(
                "carso_caller_requests", "Requests by key.", ["caller", "status"], registry=self._counting
            )
            work = self._counter("carso_caller_rows", "Rows of work done, by key.", ["caller"], registry=self._counting)
            self._callers = requests, work
        return self._callers

    def _of_endpoint(self, endpoint: str, status: int) -> tuple[Counter, Histogram]:
        """Return the series themselves. They are kept: finding them by their labels takes longer than counting does."""
        if (series := self._series.get((endpoint, status))) is None:
            series = self._series[endpoint, status] = (
                self._requests.labels(endpoint, status),
                self._duration.labels(endpoint, status),
            )
        return series

    def page(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
