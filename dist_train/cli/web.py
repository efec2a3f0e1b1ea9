"""`web`."""

from __future__ import annotations

from pathlib import Path

import click

_PORT = 8080


@click.command()
@click.option("--in", "folder", type=click.Path(path_type=Path), metavar="FOLDER", help="The folder of runs.")
@click.option("--port", default=_PORT, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="A local address.")
@click.option("--socket", "path", type=click.Path(path_type=Path), metavar="PATH",
              help="A Unix socket that only you can use, instead of a port: where others log in too.")  # fmt: skip
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Answer to this host name too, of a proxy.")
@click.option("--url", "only_url", is_flag=True, help="Print the address of a server that is running, and end.")
@click.option("--logout", is_flag=True, help="End all sessions and replace the token, and end.")
def web(
    folder: Path | None, port: int, host: str, path: Path | None, hosts: tuple[str, ...], only_url: bool, logout: bool
) -> None:
    """Open a page in the browser: look at runs, stop and resume them, compare them, take results away."""
    from dist_train.config.paths import runs_root
    from dist_train.errors import LaunchError
    from dist_train.web.access import Access, state_file
    from dist_train.web.server import address_of, greeting, is_running, serve

    address = address_of(host, port, path)
    if only_url and not is_running(host, port, path):
        raise LaunchError(
            f"No dist-train web answers at {address}. Start it, or give the --port or --socket of the one that runs."
        )
    access = Access(state_file(address))
    if logout:
        access.revoke()
        click.echo("All sessions have ended. The new address is")
    if logout or only_url:
        for line in greeting(access, host, port, path):
            click.echo(line)
        return
    serve(folder or runs_root(), host=host, port=port, path=path, hosts=frozenset(hosts), say=click.echo)
