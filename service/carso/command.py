"""The command `carso`: serve a bundle, and ask a running service. `python -m carso.command` is the same.

Each part imports what it needs when it runs: `carso --help` imports no HTTP library, and `carso classify` imports
nothing of the server.
"""

import inspect
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

log = logging.getLogger("carso.command")  # however this file is run

SERVING = (["serve"], ["demo"])
BAD_SETTING = 2
CANNOT_START = 1
BACKLOG = 128  # connections that wait while the service starts
INSTALL = "pip install 'carso[cpu]', or pip install 'carso[gpu]' for NVIDIA GPUs"


def main() -> None:
    """Run the command line. Exits with 0, with 1 for what failed or cannot start, with 2 for wrong usage or a bad
    setting.

    A signal that comes before the server takes over ends `carso serve` at once, with 0: nothing is in flight.
    """
    # Before the imports, which take most of the start: of the first process of a container, the kernel drops a signal
    # that has no handler, and the container would go on to serve.
    if sys.argv[1:2] in SERVING:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)
        if sys.platform != "win32":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server takes over, which reads the keys again
    is_serving = sys.argv[1:2] in SERVING or "_CARSO_COMPLETE" in os.environ  # the latter is a shell that completes
    command_line(with_settings=is_serving)(prog_name="carso")


def _leave(number: int, frame: FrameType | None) -> None:
    # not SystemExit, which whatever is being loaded could swallow
    os._exit(0)


def command_line(*, with_settings: bool = True) -> Any:
    """Put the parts of the command together. Returns a Typer application.

    `with_settings`: whether `serve` needs its options, which take time to make.
    """
    import typer

    from carso import bundle_commands, verification
    from carso.client import commands

    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

    def show_version(wanted: bool) -> None:
        if wanted:
            from carso.version import __version__

            typer.echo(f"carso {__version__}")
            raise typer.Exit

    @app.callback()
    def carso(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        """Serve image classification that is hardened against adversarial inputs, and ask such a service."""

    for serving in (serve, demo):
        signature = inspect.Signature(_options() if with_settings else ())
        serving.__signature__ = signature  # type: ignore[attr-defined]  # PEP 362
    for part in (serve, demo, commands.classify, commands.info, commands.bench, commands.watch, verification.verify):
        app.command()(part)
    app.add_typer(bundle_commands.group(), name="bundle")
    return app


def serve(**options: object) -> None:
    """Serve a bundle over HTTP until SIGTERM or SIGINT.

    Every setting is an option and an environment variable; the option wins.
    """
    _start(options)


def demo(**options: object) -> None:
    """Serve a bundle in one process, and open the page on which people can attack it in a browser.

    The options are those of `serve`. Where there is no browser, this says where the page is.
    """
    _start(options | {"workers": "1", "engine": "own"}, show_page=True)


def _start(options: dict[str, object], *, show_page: bool = False) -> None:
    from carso.inference.processors import usable_cpus
    from carso.inference.runtime import InstallationError, check_runtime
    from carso.settings import Settings, SettingsError
    from carso.workers.placement import how_many, may_be_on_gpu, shares_engine

    worker = _worker()
    try:
        settings = Settings.read({name: value for name, value in options.items() if value is not None})
        if show_page and not settings.page:
            raise SettingsError(
                f"{settings.called('page')}: false is not allowed with `carso demo`, which shows the page"
            )
        check_runtime()
        on_gpu = worker is None and settings.workers != 1 and may_be_on_gpu(settings.device)
        count = how_many(settings.workers, cpus=usable_cpus(), on_gpu=on_gpu) if worker is None else 1
        several = worker is None and (count > 1 or settings.engine == "shared")
        if several and settings.grpc_port is not None:
            raise SettingsError(
                f"{settings.called('grpc_port')}: {settings.grpc_port} is not allowed with several processes, and gRPC "
                f"has one: set {settings.called('workers')} to 1 and {settings.called('engine')} to own, or serve gRPC "
                "by replicas"
            )
        if several:
            _supervise(settings, count, shares_engine=shares_engine(settings.engine, on_gpu=on_gpu))
        else:
            _serve(settings, worker, show_page=show_page)
    except SettingsError as e:
        _exit(e, BAD_SETTING, worker)
    except InstallationError as e:
        _exit(e, CANNOT_START, worker)
    except ModuleNotFoundError as e:
        _exit(f"the service needs {e.name}, which is not installed: {INSTALL}", CANNOT_START, worker)


def _worker() -> Any:
    """Return what makes this process a worker; None: it is not one."""
    if "_CARSO_WORKER" not in os.environ:
        return None
    from carso.workers.worker import Worker

    return Worker.here()


def _serve(settings: Any, worker: Any, *, show_page: bool) -> None:
    """Serve in this process, alone or as a worker. Raises SettingsError."""
    from carso.app import build
    from carso.bundle import BundleError
    from carso.http.listening import CannotListen, listen, urls
    from carso.http.serving import run
    from carso.inference.abilities import DeviceError
    from carso.inference.remote import EngineLost
    from carso.telemetry import logs

    if worker is None:
        logs.configure(settings.log_level, settings.log_format)
        _warn_of_unknown_variables()
    else:
        number = None if worker.has_the_engine else worker.number
        logs.configure(settings.log_level, settings.log_format, logs.Lines(worker.board.log_lock, number))
        settings = worker.settled(settings)
    try:
        if worker is None:
            sockets, grpc_sockets = _bound(settings), _bound_for_grpc(settings)
            service = build(settings)
            if show_page:
                listen(sockets, backlog=BACKLOG)  # so that a browser which is sooner waits
                _show_page(f"{urls(sockets)[0]}{settings.root_path}/")
            run(service, settings, sockets, grpc_sockets=grpc_sockets)
        elif worker.has_the_engine:
            from carso.workers import shared

            shared.run(settings, worker)
        else:
            run(build(settings, worker.whole, worker.engine), settings, worker.sockets, worker)
    except (BundleError, CannotListen, DeviceError) as e:
        _exit(e, CANNOT_START, worker)
    except EngineLost as e:  # which only a worker can lose
        from carso.workers.worker import LOST_ENGINE

        log.warning("%s: this worker is started again", e)
        sys.exit(LOST_ENGINE)


def _supervise(settings: Any, workers: int, *, shares_engine: bool) -> None:
    """Have several processes serve, and watch over them. Raises SettingsError."""
    from carso.board.seat import Board
    from carso.telemetry import logs
    from carso.workers.supervisor import Ended, Supervisor

    board = Board.create(workers=workers, supervisor=os.getpid())
    logs.configure(settings.log_level, settings.log_format, logs.Lines(board.log_lock, None))
    _warn_of_unknown_variables()
    try:
        Supervisor(board, settings, _bound(settings), shares_engine).run()
    except Ended as e:
        _exit(e, e.status)


def _bound(settings: Any) -> list[socket.socket]:
    """Open the sockets of the service: before the bundle is loaded, so that a taken port is known at once."""
    return _bound_at(settings, "port")


def _bound_for_grpc(settings: Any) -> list[socket.socket]:
    """As `_bound`, for gRPC; nothing, if it is not asked for."""
    return [] if settings.grpc_port is None else _bound_at(settings, "grpc_port")


def _bound_at(settings: Any, setting: str) -> list[socket.socket]:
    from carso.http.listening import CannotListen, UnknownHost, bind

    try:
        return bind(settings.host, getattr(settings, setting), setting=setting)
    except UnknownHost as e:
        _exit(
            f"{settings.called('host')}: {settings.host!r} is not an address, and no name that is known: {e}",
            BAD_SETTING,
        )
    except CannotListen as e:
        _exit(e, CANNOT_START)


def _warn_of_unknown_variables() -> None:
    from carso.settings import unknown_variables

    for name in unknown_variables():
        log.warning("%s is in the environment but is not a setting of this service", name)


def _show_page(url: str) -> None:
    from carso.browser import opens

    url = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    opened = opens(url)
    sys.stdout.write(f"The page is at {url}{'' if opened else ' (there is no browser here to open it in)'}\n")
    sys.stdout.flush()


def _options() -> list[inspect.Parameter]:
    """Make the parameters that Typer makes the options of `serve` of: one for each setting.

    Their values are text, so that Settings says what is wrong with one in the same words as of a variable; only
    switches, such as --spin and --no-spin, are true or false. What is not given is None.
    """
    import typer

    from carso import settings
    from carso.complaints import allowed

    parameters = []
    for name, field in settings.Settings.model_fields.items():
        in_words = allowed(settings.Settings, name)
        choices = list(get_args(field.annotation)) if get_origin(field.annotation) is Literal else []
        is_switch = field.annotation is bool
        option = typer.Option(
            settings.option(name) + (f"/{settings.option(f'no_{name}')}" if is_switch else ""),
            help=f"{field.description} "
            + (f"Allowed: {in_words}. " if " from " in in_words else "")
            + f"Default: {settings.default_of(name)}. Variable: {settings.variable(name)}.",
            metavar=None if is_switch else "|".join(choices) or _noun(name, in_words),
            autocompletion=_completing(choices) if choices else None,
            rich_help_panel=settings.group_of(name),
            show_default=False,
        )
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[bool | None if is_switch else str | None, option],
            )
        )
    return parameters


def _completing(choices: list[str]) -> Callable[[], list[str]]:
    return lambda: choices


def _noun(name: str, allowed: str) -> str:
    if name.endswith("_s"):
        return "SECONDS"
    return {"an integer": "INTEGER", "a path": "PATH"}.get(" ".join(allowed.split()[:2]), "TEXT")


def _exit(error: object, status: int, worker: Any = None) -> NoReturn:
    """Exit, and say why: to standard error, or to the supervisor, which says it once for all workers."""
    if worker is None:
        sys.stderr.write(f"carso: {error}\n")
    else:
        worker.refuse(str(error))
    sys.exit(status)


if __name__ == "__main__":
    main()
