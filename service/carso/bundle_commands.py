"""The commands `carso bundle verify` and `carso bundle sign`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from carso.bundle import Bundle

NOT_SOUND = 1

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the bundle.")]


def group() -> Any:
    """Put the commands together. Returns a Typer application."""
    app = typer.Typer(no_args_is_help=True, help="Check a bundle, and sign it.")
    app.command()(verify)
    app.command()(sign)
    return app


def verify(
    folder: Folder,
    *,
    public_key: Annotated[
        Path | None,
        typer.Option(
            envvar="CARSO_BUNDLE_PUBLIC_KEY", help="PEM file of the key whose signature the bundle must have."
        ),
    ] = None,
) -> None:
    """Check a bundle: its files' checksums, that its graphs give the right answers, and its signature.

    Exit status 0: all is well. 1: something is not.
    """
    _reported(lambda: _verify(folder, public_key))


def sign(
    folder: Folder,
    *,
    private_key: Annotated[Path, typer.Option(help="PEM file of a private key: P-256, P-384 or P-521.")],
) -> None:
    """Sign a bundle: write model.sig into its folder, in the format of OpenSSF Model Signing."""
    _reported(lambda: _sign(folder, private_key))


def _verify(folder: Path, public_key: Path | None) -> None:
    from carso.bundle import SIGNATURE, Bundle, strangers
    from carso.signing import PublicKey

    key = None if public_key is None else PublicKey.read(public_key)
    bundle = Bundle.load(folder, key=key)
    typer.echo(f"checksums  {len(bundle.digests)} files are those of {bundle.manifest.name} {bundle.checksum[:12]}")
    for name in strangers(folder, bundle.manifest):
        typer.echo(f"           {folder / name} is no file of the bundle: nothing reads it")
    _self_test(bundle)
    typer.echo("self-test  the graphs give the answers that the bundle holds")
    if key is not None:
        typer.echo(f"signature  made with the key {key.fingerprint}")
    elif (folder / SIGNATURE).exists():
        typer.echo("signature  there is one; --public-key checks it")
    else:
        typer.echo("signature  none")


def _self_test(bundle: Bundle) -> None:
    """Run every graph on processors. Raises DeviceError, InstallationError."""
    from carso.inference.runtime import check_runtime
    from carso.inference.sessions import Sessions

    check_runtime()
    Sessions(bundle, device="cpu", precision="float32")
    if bundle.vote_int8 is not None:
        Sessions(bundle, device="cpu", precision="int8")


def _sign(folder: Path, private_key: Path) -> None:
    from carso.bundle import SIGNATURE
    from carso.signing import sign

    key = sign(folder, private_key)
    typer.echo(f"{folder / SIGNATURE}: signed with the key {key.fingerprint}")


def _reported(work: Callable[[], None]) -> None:
    """Do it; end with a line on standard error if it fails."""
    try:
        from carso.bundle import BundleError
        from carso.inference.abilities import DeviceError
        from carso.inference.runtime import InstallationError
        from carso.signing import UnusableKey
    except ModuleNotFoundError as e:
        _fail(f"this needs {e.name}, which is not installed: pip install 'carso[cpu]'")
    try:
        work()
    except (BundleError, DeviceError, InstallationError, UnusableKey, OSError) as e:
        _fail(e)


def _fail(error: object) -> NoReturn:
    typer.echo(f"carso: {error}", err=True)
    raise typer.Exit(NOT_SOUND)
