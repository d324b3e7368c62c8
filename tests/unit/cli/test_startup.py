"""What a search from the shell imports, which is most of the time that it takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from helpers import tiny
from helpers.fake_embedder import write_pairs
from helpers.processes import run_process
from vlduet.model.duet import DuetModel
from vlduet.retrieval.build import build_index

UNUSED_MODULES = {
    "datasets",
    "lance_namespace_urllib3_client",
    "lancedb.namespace",
    "lancedb.remote",
    "matplotlib",
    "numba",
    "pandas",
    "peft",
    "sklearn",
    "starlette",
    "vlduet.data.formats",
    "vlduet.train",
}
"""Modules that a search needs none of, and that are, or cost, a lot."""

SEARCH = """
import json, sys
from typer.testing import CliRunner
from vlduet.cli.main import app

result = CliRunner().invoke(app, ["search", sys.argv[1], "red", "--json"], catch_exceptions=False)
hits = json.loads(result.stdout)["hits"]
print(json.dumps({"hits": len(hits), "modules": list(sys.modules)}))
"""

CLIENTS = """
import sys
from vlduet.retrieval.stores.lancedb_import import disable_pandas, import_lancedb

disable_pandas()
lancedb = import_lancedb()
assert "lancedb.remote" not in sys.modules and "pandas" not in sys.modules
assert import_lancedb() is lancedb
config = lancedb.ClientConfig(id_delimiter="-")  # a stand-in, which imports the client
assert type(config).__module__ == "lancedb.remote" and config.id_delimiter == "-"
assert isinstance(config, lancedb.ClientConfig) and not isinstance(3, lancedb.ClientConfig)

import lancedb.remote, lancedb.namespace, pandas, pyarrow
from lance_namespace_urllib3_client.models import ListTablesRequest

assert lancedb.remote.ClientConfig is type(config)
assert lancedb.namespace.connect_namespace.__module__ == "lancedb.namespace"
assert ListTablesRequest(limit=3).limit == 3
table = pyarrow.Table.from_pandas(pandas.DataFrame({"a": [1, 2]}))
assert table.to_pandas()["a"].tolist() == [1, 2]
"""


OTHER_VERSION = """
import sys
from vlduet.retrieval.stores.lancedb_import import import_lancedb

sys.path.insert(0, sys.argv[1])
lancedb = import_lancedb()
assert isinstance(lancedb.make(), lancedb.Base)
assert lancedb.Base.__module__ == sys.argv[2]
"""


def test_a_search_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")
    model = DuetModel.from_pretrained(tmp_path / "model")
    source = write_pairs(tmp_path / "source")
    build_index(model, source, to=tmp_path / "index", model_path=tmp_path / "model")
    result = run_process([sys.executable, "-c", SEARCH, tmp_path / "index"], check=True)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["hits"] == 4
    assert {"torch", "transformers", "lancedb"} <= set(report["modules"])
    assert UNUSED_MODULES & set(report["modules"]) == set()


def test_clients_of_lancedb_and_pandas_are_imported_when_they_are_used() -> None:
    run_process([sys.executable, "-c", CLIENTS], check=True)


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("remote", "make = Base().make"),
        ("remote", "class make(Base): pass"),
        ("cloud", "make = Base"),
    ],
    ids=["called", "derived", "renamed"],
)
def test_another_version_of_lancedb_may_use_its_clients_at_once(
    tmp_path: Path, module: str, statement: str
) -> None:
    package = tmp_path / "lancedb"
    package.mkdir()
    (package / "__init__.py").write_text(f"from .{module} import Base\n{statement}\n")
    base = "class Base:\n    make = classmethod(lambda cls: cls())\n"
    (package / f"{module}.py").write_text(base)
    command = [sys.executable, "-c", OTHER_VERSION, tmp_path, f"lancedb.{module}"]
    run_process(command, check=True)
