"""Clients of OpenAI's API, unmodified, against a running server."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.processes import run_process
from slow.conftest import API_KEY, LiveServer

MAX_NPM_SECONDS = 200
TEXTS = ["a red square", "a blue square", "something else"]


def similarity(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------ openai-python


@pytest.fixture
def client(server: LiveServer) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0)


def test_openai_python_embeds(client: Any, server: LiveServer) -> None:
    # The client asks for base64 unless the caller names a format.
    default = client.embeddings.create(model=server.model, input=TEXTS)
    floats = client.embeddings.create(model=server.model, input=TEXTS, encoding_format="float")
    assert [item.index for item in default.data] == [0, 1, 2]
    for a, b in zip(default.data, floats.data, strict=True):
        assert a.embedding == pytest.approx(b.embedding, abs=1e-5)
        assert similarity(a.embedding, a.embedding) == pytest.approx(1, abs=1e-3)
    assert default.usage.prompt_tokens == default.usage.total_tokens > 5
    assert default.model == server.model


def test_openai_python_chats_and_streams(client: Any, server: LiveServer) -> None:
    image = {"type": "image_url", "image_url": {"url": server.image_url}}
    content = [{"type": "text", "text": "What is this?"}, image]
    options: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 12,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert 0 < answer.usage.completion_tokens <= 12
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.strip() == (answer.choices[0].message.content or "").strip()
    assert [c.usage for c in chunks if c.usage][-1].total_tokens == answer.usage.total_tokens


def test_openai_python_gets_sources(client: Any, server: LiveServer) -> None:
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "a red square"}],
        max_tokens=4,
        extra_body={"retrieval": {"k": 2}},
    )
    sources = answer.model_extra["sources"]
    assert len(sources) == 2 and {"id", "score", "text", "image"} <= sources[0].keys()


def test_openai_python_gets_interleaved_answers(client: Any, server: LiveServer) -> None:
    """A whole answer has a list of parts; a stream is read as text."""
    question = {"role": "user", "content": "Describe a red square and a blue square."}
    options: dict[str, Any] = {"model": server.model, "max_tokens": 40, "temperature": 0}
    body = {"retrieval": {"mode": "interleave", "feed_back": True, "max_images": 2}}
    answer = client.chat.completions.create(messages=[question], extra_body=body, **options)
    parts = answer.choices[0].message.content
    text = "".join(part.get("text", "") for part in parts)
    hits = [part["hit"] for part in parts if part["type"] == "image_url"]
    assert text and hits == answer.model_extra["sources"]
    assert answer.model_extra["images"]["retrieved"] == len(hits)
    with client.chat.completions.create(
        messages=[question], extra_body=body, stream=True, **options
    ) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas).strip() == text.strip()
    streamed = [part for delta in deltas for part in (delta.model_extra or {}).get("parts", ())]
    assert [part["hit"]["id"] for part in streamed] == [hit["id"] for hit in hits]
    earlier = {"role": "assistant", "content": parts}
    messages = [question, earlier, {"role": "user", "content": "And another one?"}]
    answer = client.chat.completions.create(messages=messages, extra_body=body, **options)
    assert answer.model_extra["images"]["left_out"] == 0


def test_openai_python_gets_an_image_at_every_place_of_a_template(
    client: Any, server: LiveServer
) -> None:
    options = {"mode": "interleave", "template": "One: {image} Two: {image}."}
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Show squares."}],
        extra_body={"retrieval": options},
    )
    kinds = [part["type"] for part in answer.choices[0].message.content]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert answer.usage.completion_tokens == 0


def test_openai_python_reads_errors(client: Any, server: LiveServer) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length"):
        client.embeddings.create(model=server.model, input=[[1, 2, 3]])
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.embeddings.create(model="other", input="a")
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Bearer KEY"):
        other.models.list()
    assert [model.id for model in client.models.list()] == [server.model]


# ------------------------------------------------------------------ LangChain


def test_langchain_embeds(server: LiveServer) -> None:
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        model=server.model,
        base_url=f"{server.url}/v1",
        api_key=API_KEY,
        check_embedding_ctx_length=False,
    )
    vectors = embeddings.embed_documents(TEXTS)
    assert len(vectors) == 3
    query = embeddings.embed_query(TEXTS[0])
    scores = [similarity(query, vector) for vector in vectors]
    assert len(query) == len(vectors[0]) and max(scores) == scores[0]


def test_langchain_chats_and_streams(server: LiveServer) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        model=server.model,
        base_url=f"{server.url}/v1",
        api_key=API_KEY,
        max_tokens=8,
        temperature=0,
        max_retries=0,
    )
    image = {"type": "image_url", "image_url": {"url": server.image_url}}
    messages = [
        SystemMessage("You answer briefly."),
        HumanMessage(content=[{"type": "text", "text": "What is this?"}, image]),
    ]
    answer = chat.invoke(messages)
    assert 0 < answer.usage_metadata["output_tokens"] <= 8
    text = "".join(str(chunk.content) for chunk in chat.stream(messages))
    assert text.strip() == str(answer.content).strip()


# ------------------------------------------------------------------ openai for Node.js


SCRIPT = """
import OpenAI from "openai";
const [url, key, model, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: key, maxRetries: 0 });
const input = ["a red square", "a blue square"];
const embeddings = await client.embeddings.create({ model, input });
const floats = await client.embeddings.create({ model, input, encoding_format: "float" });
const content = [{ type: "text", text: "What?" }, { type: "image_url", image_url: { url: image } }];
const request = { model, messages: [{ role: "user", content }], max_tokens: 6, temperature: 0 };
const answer = await client.chat.completions.create(request);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...request, stream: true }))
  text += chunk.choices[0]?.delta?.content ?? "";
const template = "One: {image} Two: {image}.";
const interleaved = { ...request, retrieval: { mode: "interleave", template } };
const whole = await client.chat.completions.create(interleaved);
let story = "", images = [];
for await (const chunk of await client.chat.completions.create({ ...interleaved, stream: true })) {
  story += chunk.choices[0]?.delta?.content ?? "";
  images.push(...(chunk.choices[0]?.delta?.parts ?? []).map((part) => part.image_url.url));
}
let status = 0;
try { await client.embeddings.create({ model, input: [[1, 2]] }); }
catch (error) { status = error.status; }
console.log(JSON.stringify({
  vectors: embeddings.data.map((item) => item.embedding),
  floats: floats.data.map((item) => item.embedding),
  tokens: embeddings.usage.total_tokens,
  answer: answer.choices[0].message.content, text, status, story, images,
  parts: whole.choices[0].message.content,
}));
"""


@pytest.fixture(scope="module")
def node_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the npm package `openai`; skip where npm cannot install it."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("npm or node is not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"type": "module", "private": true}')
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "openai"]
    process = run_process(command, cwd=folder, timeout=MAX_NPM_SECONDS)
    if process.returncode != 0:
        pytest.skip(f"npm cannot install openai: {process.stderr.strip().splitlines()[-1:]}")
    (folder / "client.mjs").write_text(SCRIPT)
    return folder


def test_openai_for_node_embeds_chats_and_streams(node_project: Path, server: LiveServer) -> None:
    import json

    command = ["node", "client.mjs", server.url, API_KEY, server.model, server.image_url]
    result = json.loads(run_process(command, cwd=node_project, check=True).stdout)
    for vector, floats in zip(result["vectors"], result["floats"], strict=True):
        assert vector == pytest.approx(floats, abs=1e-5)
    assert result["tokens"] > 4 and result["status"] == 400
    assert result["answer"].strip() == result["text"].strip()
    assert result["story"] == "".join(part.get("text", "") for part in result["parts"])
    urls = [part["image_url"]["url"] for part in result["parts"] if "image_url" in part]
    assert len(urls) == 2 and urls == result["images"]
