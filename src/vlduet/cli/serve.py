"""`vlduet serve`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from vlduet.logs import logger

LOOPBACK = ["127.0.0.1", "localhost", "[::1]", "::1"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(serve)


def serve(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The model's folder, or a supported checkpoint.")
    ],
    *,
    index: Annotated[
        Path | None, typer.Option(metavar="INDEX", help="An index of this model, to answer from.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for any that this machine has.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Answer only who brings one of these API keys, one a line."
        ),
    ] = None,
) -> None:
    """Answer chats and embed with one copy of a model, over HTTP in OpenAI's forms."""
    from vlduet.errors import ConfigError

    try:  # before the model is read, which may take minutes
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        what = (error.strerror or str(error)).partition(" (")[0]
        raise ConfigError(
            what, place=f"{host}:{port}", fix="Choose another --port or --host"
        ) from None
    from vlduet.encoders.dual import open_embedder
    from vlduet.retrieval.index import Index
    from vlduet.serve.app import Service, run_server
    from vlduet.serve.auth import read_api_keys
    from vlduet.serve.worker import Worker

    known = None if keys is None else read_api_keys(keys)
    loaded = open_embedder(model)
    opened = None if index is None else Index.open(index, loaded)
    worker = Worker(loaded)
    name = model.resolve().name
    at = f"http://{host if ':' not in host else f'[{host}]'}:{listening.getsockname()[1]}/v1"
    logger.info(f"{name} answers and embeds at {at} (Ctrl-C ends it)")
    if known is None and host not in LOOPBACK:
        logger.info(f"anyone who reaches {host} may ask: give --keys, or keep others out by other means")
    service = Service(worker, name=name, index=opened)
    try:
        run_server(
            service.build_app(allowed_hosts=LOOPBACK if host in LOOPBACK else None, api_keys=known),
            listening,
        )
    finally:  # uvicorn hands Ctrl-C on
        worker.close()
