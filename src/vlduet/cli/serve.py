"""`vlduet serve`."""

from __future__ import annotations

import logging
import os
import socket
import sys
import webbrowser
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlduet.cli._common import ModelFolder
from vlduet.logs import logger

if TYPE_CHECKING:
    from vlduet.serve.server import AccessRules, LoadedApp

INDEX = "An index of this model; enables search and retrieval."
HOST = "Address to listen at; 0.0.0.0 for all addresses of this machine."
KEYS = "File of API keys, one per line; only requests with one of them are answered."
OPEN = "Open the web page in the system's browser once the model is loaded."
STRICT = "Refuse requests with fields that this server does not know."
ALLOW_IMAGE_HOST = "A host whose images may be named by URL, HOST or HOST:PORT; repeatable."
ALLOW_HOST = "A further name under which clients reach the server, such as a proxy's; repeatable."
CORS_ORIGIN = "Origin of web pages that may call the server, https://HOST or *; repeatable."


def serve(
    model: ModelFolder,
    *,
    index: Annotated[Path | None, typer.Option(metavar="INDEX", help=INDEX)] = None,
    host: Annotated[str, typer.Option(help=HOST)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 selects a free one.")] = 8000,
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help=KEYS)] = None,
    allow_host: Annotated[list[str] | None, typer.Option(metavar="NAME", help=ALLOW_HOST)] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help=CORS_ORIGIN)
    ] = None,
    allow_image_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help=ALLOW_IMAGE_HOST)
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help=STRICT)] = False,
    open_page: Annotated[bool, typer.Option("--open", help=OPEN)] = False,
) -> None:
    """Chat, embed and search with one copy of a model, over HTTP and on a web page.

    The page is at the printed address, the API in OpenAI's format below it at /v1. The model is
    named like its folder. /readyz tells when it is loaded. Ctrl-C or SIGTERM ends the
    server with status 0 once running answers have ended, or after 5 seconds; a second one at once.
    On the default host, only requests to this machine's local names and those of --allow-host are
    answered; any other host without --keys gives a warning. An address that is taken, an unusable
    file of keys, and an index of another model are errors.
    """
    rules = _read_rules(host, keys, allow_hosts=allow_host or [], origins=cors_origin or [])
    image_hosts = _read_image_hosts(allow_image_host or [])
    # The port is claimed before the model is loaded, which may take minutes.
    listening_socket = _listen(host, port)
    from vlduet.serve.hosts import LOOPBACK_HOSTS
    from vlduet.serve.server import Backend, build_server, run_server

    name = model.resolve().name
    load = partial(_load_app, model, index, name=name, strict=strict, image_hosts=image_hosts)
    url_host = f"[{host}]" if ":" in host else host
    url = f"http://{url_host}:{listening_socket.getsockname()[1]}/"
    if rules.api_keys is None and host not in LOOPBACK_HOSTS:
        logger.warning(f"everyone who reaches {host} is served: give --keys, or use a firewall")
    server = build_server(Backend(), rules=rules)

    def announce() -> None:
        logger.info(f"{name} answers and embeds at {url}v1 (Ctrl-C ends it)")
        logger.info(f"web page: {url}")
        if open_page and not webbrowser.open(url):
            logger.warning(f"no browser can be started here: open {url} in one")

    has_ended = run_server(server, load, listening_socket, on_ready=announce)
    if not has_ended:
        # A thread that computes is not waited for, and must not meet an interpreter that ends.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(0)


def _load_app(
    model: Path,
    index: Path | None,
    *,
    name: str,
    strict: bool,
    image_hosts: list[str],
) -> LoadedApp:
    """Load model and index; runs while the server says that it is not ready."""
    from vlduet.encoders.dual import open_embedder
    from vlduet.retrieval.index import Index
    from vlduet.serve.app import Service
    from vlduet.serve.server import LoadedApp
    from vlduet.serve.url_images import ImageUrlPolicy, make_url_loader
    from vlduet.serve.worker import Worker

    loaded = open_embedder(model)
    opened_index = None if index is None else Index.open(index, loaded)
    worker = Worker(loaded)
    service = Service(
        worker,
        name=name,
        index=opened_index,
        strict=strict,
        load_url=make_url_loader(ImageUrlPolicy(image_hosts)) if image_hosts else None,
    )
    count_documents = None if opened_index is None else opened_index.count
    return LoadedApp(service.build_app(), worker, count_documents)


def _read_rules(
    host: str, keys: Path | None, *, allow_hosts: list[str], origins: list[str]
) -> AccessRules:
    """Return the requests that are answered: on a host of this machine alone, only local names.

    Raises ConfigError for an unusable file of keys, host name or origin.
    """
    from vlduet.serve.auth import read_api_keys
    from vlduet.serve.hosts import LOOPBACK_HOSTS, check_host_name, check_origin
    from vlduet.serve.server import AccessRules

    names = [check_host_name(name, option="--allow-host") for name in allow_hosts]
    allowed_hosts = None
    if host in LOOPBACK_HOSTS or names:
        allowed_hosts = [*LOOPBACK_HOSTS, host.lower(), *names]
    return AccessRules(
        allowed_hosts=allowed_hosts,
        api_keys=None if keys is None else read_api_keys(keys),
        cors_origins=[check_origin(origin, option="--cors-origin") for origin in origins],
    )


def _read_image_hosts(names: list[str]) -> list[str]:
    """Return the hosts of which images are read; raise ConfigError for one that is not a host."""
    from vlduet.serve.url_images import check_image_host

    return [check_image_host(name, option="--allow-image-host") for name in names]


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
