"""The Dockerfile and the compose file follow the rules of hadolint and of a hardened container.

`make slow` replays the steps of the Dockerfile in a clean folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.dockerfile import read_dockerfile
from vlduet.serve.auth import PUBLIC_PATHS
from vlduet.serve.limits import ServerLimits
from vlduet.serve.server import CLOSE_SECONDS

ROOT = Path(__file__).parents[1]
INSTRUCTIONS = read_dockerfile(ROOT / "Dockerfile")
LAST_STAGE = [i for i in INSTRUCTIONS if i.stage == INSTRUCTIONS[-1].stage]


def values(name: str, instructions: Any = INSTRUCTIONS) -> list[str]:
    return [instruction.value for instruction in instructions if instruction.name == name]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    """The only service of the compose file."""
    content = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert list(content["services"]) == ["vlduet"]
    value: dict[str, Any] = content["services"]["vlduet"]
    return value


def test_base_images_have_a_tag_of_one_version() -> None:
    images = values("FROM")
    assert images
    for image in images:
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+( AS \w+)?", image), image
    assert len({image.split()[0] for image in images}) == 1, "built and run with one Python"


def test_the_container_does_not_run_as_root() -> None:
    users = values("USER", LAST_STAGE)
    assert len(users) == 1 and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[0]), users
    names = [instruction.name for instruction in LAST_STAGE]
    assert not {"RUN", "COPY"} & set(names[names.index("USER") :]), "root owns all files"


def test_nothing_is_fetched_from_an_address_or_the_whole_folder_copied() -> None:
    assert not values("ADD")
    for value in values("COPY"):
        assert "://" not in value and not re.match(r"\.\s", value), value
    for command in values("RUN"):
        assert not re.search(r"\b(curl|wget|sudo|apt-get|git)\b", command), command


def test_packages_are_those_of_the_lock() -> None:
    commands = " && ".join(values("RUN"))
    installs = re.findall(r"pip install [^&]*", commands)
    assert len(installs) == 3
    assert "--require-hashes --no-deps -r requirements/lock.txt" in installs[0]
    assert "-r requirements/torch.txt" in installs[1] and "--no-deps" in installs[1]
    assert "--no-deps --no-build-isolation ." in installs[2]


def test_all_sources_of_copies_exist_and_are_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for value in values("COPY"):
        if value.startswith("--from"):
            continue
        *sources, _ = value.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, f"{source} does not reach the builder"


def test_health_is_readiness_and_needs_no_key() -> None:
    (check,) = values("HEALTHCHECK")
    assert "127.0.0.1:8000/readyz" in check and "/readyz" in PUBLIC_PATHS
    assert values("EXPOSE") == ["8000"]
    for command in (*values("ENTRYPOINT"), *values("CMD")):
        assert command.startswith("["), "a shell would not pass signals on"


def test_no_secret_is_in_the_image() -> None:
    for value in values("ENV") + values("ARG"):
        assert not re.search(r"key|token|secret|password", value, re.IGNORECASE), value


def test_the_service_is_read_only_and_without_privileges(service: dict[str, Any]) -> None:
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == values("USER", LAST_STAGE)[0]
    assert all(volume.endswith(":ro") for volume in service["volumes"])
    assert [entry.split(":")[0] for entry in service["tmpfs"]] == ["/tmp"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert not {"privileged", "network_mode", "pid", "ipc", "devices"} & service.keys()
    assert "--keys=/data/keys.txt" in service["command"]


def test_the_service_may_end_in_order_before_it_is_killed(service: dict[str, Any]) -> None:
    seconds = int(service["stop_grace_period"].removesuffix("s"))
    assert seconds > ServerLimits().shutdown_seconds + CLOSE_SECONDS + 2


def test_the_command_of_the_service_parses(service: dict[str, Any]) -> None:
    import typer

    from vlduet.cli.main import app

    command: Any = typer.main.get_command(app)
    for arguments in (service["command"], yaml.safe_load(values("CMD")[0])):
        name, *options = arguments
        context = command.commands[name].make_context(name, options)
        assert context.params["host"] == "0.0.0.0" and context.params["port"] == 8000
