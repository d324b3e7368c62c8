"""`vlduet serve`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from vlduet.cli._common import ModelFolder
from vlduet.logs import logger

LOOPBACK_HOSTS = ["127.0.0.1", "localhost", "[::1]", "::1"]
INDEX = "An index of this model; enables search and retrieval."
HOST = "Address to listen at; 0.0.0.0 for all addresses of this machine."
KEYS = "File of API keys, one per line; only requests with one of them are answered."


def serve(
    model: ModelFolder,
    *,
    index: Annotated[Path | None, typer.Option(metavar="INDEX", help=INDEX)] = None,
    host: Annotated[str, typer.Option(help=HOST)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 selects a free one.")] = 8000,
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help=KEYS)] = None,
) -> None:
    """Chat and embed with one copy of a model, over HTTP in the format of OpenAI's API.

    The model is named like its folder. Runs until it is interrupted. On the default host, only
    requests to this machine's local names are answered; any other host without --keys gives a
    warning. An address that is taken, an unusable file of keys, and an index of another model are
    errors.
    """
    # The port is claimed before the model is loaded, which may take minutes.
    listening_socket = _listen(host, port)
    from vlduet.encoders.dual import open_embedder
    from vlduet.retrieval.index import Index
    from vlduet.serve.app import Service, run_server
    from vlduet.serve.auth import read_api_keys
    from vlduet.serve.worker import Worker

    api_keys = None if keys is None else read_api_keys(keys)
    loaded = open_embedder(model)
    opened_index = None if index is None else Index.open(index, loaded)
    worker = Worker(loaded)
    name = model.resolve().name
    url_host = f"[{host}]" if ":" in host else host
    url = f"http://{url_host}:{listening_socket.getsockname()[1]}/v1"
    logger.info(f"{name} answers and embeds at {url} (Ctrl-C ends it)")
    is_local = host in LOOPBACK_HOSTS
    if api_keys is None and not is_local:
        logger.warning(f"everyone who reaches {host} is served: give --keys, or use a firewall")
    service = Service(worker, name=name, index=opened_index)
    allowed_hosts = LOOPBACK_HOSTS if is_local else None
    try:
        app = service.build_app(allowed_hosts=allowed_hosts, api_keys=api_keys)
        run_server(app, listening_socket)
    finally:  # uvicorn raises KeyboardInterrupt again after its own shutdown
        worker.close()


def _listen(host: str, port: int) -> socket.socket:
    """Return a new socket that listens at an address, of IPv6 if the host contains a colon.

    Port 0 selects a free port. Raises ConfigError if the address is not available.
    """
    from vlduet.errors import ConfigError

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        message = (error.strerror or str(error)).partition(" (")[0]
        fix = "Choose another --port or --host"
        raise ConfigError(message, place=f"{host}:{port}", fix=fix) from None
