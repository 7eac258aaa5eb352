"""The command `carso`: serve a bundle, and ask a running service. `python -m carso.command` is the same.

Each part imports what it needs when it runs: `carso --help` imports no HTTP library, and `carso classify` imports
nothing of the server.
"""

import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

log = logging.getLogger("carso.command")  # however this file is run

BAD_SETTING = 2
CANNOT_START = 1
INSTALL = "pip install 'carso[cpu]', or pip install 'carso[gpu]' for NVIDIA GPUs"


def main() -> None:
    """Run the command line. Exits with 0, with 1 for what failed or cannot start, with 2 for wrong usage or a bad
    setting.

    A signal that comes before the server takes over ends `carso serve` at once, with 0: nothing is in flight.
    """
    # Before the imports, which take most of the start: of the first process of a container, the kernel drops a signal
    # that has no handler, and the container would go on to serve.
    if "serve" in sys.argv[1:2]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)
        if sys.platform != "win32":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server takes over, which reads the keys again
    is_serving = "serve" in sys.argv[1:2] or "_CARSO_COMPLETE" in os.environ  # the latter is a shell that completes
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

    serve.__signature__ = inspect.Signature(_options() if with_settings else ())  # type: ignore[attr-defined]  # PEP 362
    for part in (serve, commands.classify, commands.info, commands.bench, verification.verify):
        app.command()(part)
    app.add_typer(bundle_commands.group(), name="bundle")
    return app


def serve(**options: object) -> None:
    """Serve a bundle over HTTP until SIGTERM or SIGINT.

    Every setting is an option and an environment variable; the option wins.
    """
    from carso.inference.runtime import InstallationError, check_runtime
    from carso.settings import Settings, SettingsError, unknown_variables

    try:
        settings = Settings.read({name: value for name, value in options.items() if value is not None})
        check_runtime()
        from carso.app import build
        from carso.bundle import BundleError
        from carso.http.listening import CannotListen, UnknownHost, bind
        from carso.http.serving import run
        from carso.inference.sessions import DeviceError
        from carso.telemetry import logs
    except SettingsError as e:
        _exit(e, BAD_SETTING)
    except InstallationError as e:
        _exit(e, CANNOT_START)
    except ModuleNotFoundError as e:
        _exit(f"the service needs {e.name}, which is not installed: {INSTALL}", CANNOT_START)
    logs.configure(settings.log_level, settings.log_format)
    for name in unknown_variables():
        log.warning("%s is in the environment but is not a setting of this service", name)
    try:
        sockets = bind(settings.host, settings.port)
        run(build(settings), settings, sockets)
    except UnknownHost as e:
        _exit(
            f"{settings.called('host')}: {settings.host!r} is not an address, and no name that is known: {e}",
            BAD_SETTING,
        )
    except SettingsError as e:
        _exit(e, BAD_SETTING)
    except (BundleError, CannotListen, DeviceError) as e:
        _exit(e, CANNOT_START)


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


def _exit(error: object, status: int) -> NoReturn:
    sys.stderr.write(f"carso: {error}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
