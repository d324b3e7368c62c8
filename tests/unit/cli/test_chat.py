"""`vlduet chat`: commands and messages, from a pipe and at a terminal."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from helpers import tiny
from helpers.answer_script import AnswerScript
from helpers.fake_embedder import paint, write_pairs
from vlduet.cli import chat_commands, chat_terminal, main, viewer
from vlduet.cli.chat import END_SIGNALS
from vlduet.cli.chat_commands import ChatCommands, parse_path
from vlduet.cli.chat_terminal import CommandCompleter, run_terminal
from vlduet.data.records import ImageRef
from vlduet.errors import ConfigError, ModelError, VLDuetError
from vlduet.model.duet import DuetModel
from vlduet.model.generation.interleave import RetrievedImage, TextDelta
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import Hit
from vlduet.workflows.chat_session import ChatSession, ChatSettings

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    return tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def index(model: DuetModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an index of a red and a blue square."""
    folder = tmp_path_factory.mktemp("index")
    squares = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    build_index(model, write_pairs(folder / "source", squares), to=folder / "index")
    return folder / "index"


@pytest.fixture
def script(model: DuetModel, monkeypatch: pytest.MonkeyPatch) -> AnswerScript:
    script = AnswerScript()
    monkeypatch.setattr(model, "generate", script.generate)
    monkeypatch.setattr(model, "interleave", script.interleave)
    monkeypatch.setattr(DuetModel, "from_pretrained", lambda folder: model)
    monkeypatch.setattr(viewer, "find_viewer", lambda: None)
    return script


@pytest.fixture
def commands(model: DuetModel, script: AnswerScript, tmp_path: Path) -> ChatCommands:
    return ChatCommands(ChatSession(model, folder=tmp_path), is_interactive=True)


def run_main(monkeypatch: pytest.MonkeyPatch, lines: str, *words: object) -> int:
    """Run `vlduet chat MODEL WORDS` with lines as its input, and return the exit status."""
    monkeypatch.setattr(sys, "argv", ["vlduet", "chat", "MODEL", *map(str, words)])
    stream = io.TextIOWrapper(io.BytesIO(lines.encode("utf-8", "surrogateescape")), "utf-8")
    monkeypatch.setattr(sys, "stdin", stream)
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    return int(exit_info.value.code or 0)


def test_lines_of_a_pipe_are_messages_and_commands(
    index: Path, script: AnswerScript, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = (
        "Hello\n\n/retrieve off\n /is a message\n/scope dialog\n/search red\n/quit\nNever read\n"
    )
    assert run_main(monkeypatch, lines, "--index", index, "-k", 1, "--max-new-tokens", 9) == 0
    out, err = capsys.readouterr()
    assert not err
    assert out.startswith("An answer.\nSources:\n[1] 0.")
    source = index.parent / "source" / "images"
    assert out.count("image 1: ") == 2, "an image keeps its number"
    assert "retrieval: off\nAn answer.\nscope: dialog\n[1] 0." in out
    assert f"red  a red square\n    image 1: {source / 'red.png'}" in out or "image 2" in out
    assert [message.parts[-1] for message in script.prompts[-1]] == [
        "Hello",
        "An answer.",
        " /is a message",
    ]
    assert script.options[0]["max_new_tokens"] == 9
    assert len(script.prompts) == 2


def test_the_first_wrong_line_of_a_pipe_ends_the_program_with_status_1(
    index: Path, script: AnswerScript, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for lines, message in {
        "Hello\n/serch red\nHello\n": "unknown command /serch. Did you mean '/search'? A space",
        "Hello\ncaf\udce9\nHello\n": "the input is not valid UTF-8",
        "/image no\x1bfile.png\nHello\n": "no file.png: no such file",
    }.items():
        script.prompts = []
        assert run_main(monkeypatch, lines, "--index", index) == 1
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and message in err
        assert len(script.prompts) == out.count("An answer.") <= 1
    assert run_main(monkeypatch, "", "--retrieve", "context") == 1
    assert "retrieval: there is no index" in capsys.readouterr().err


def test_copies_of_images_are_deleted_when_the_terminal_is_closed(
    script: AnswerScript, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    handlers = [signal.getsignal(number) for number in END_SIGNALS]

    def close_terminal(commands: ChatCommands, lines: object) -> None:
        commands.session.attach(paint(tmp_path / "red.png", (255, 0, 0)))
        assert len(list(copies.glob("*/*.png"))) == 1
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGTERM)  # a second signal, during the cleanup

    monkeypatch.setattr(chat_terminal, "run_lines", close_terminal)
    assert run_main(monkeypatch, "") == 128 + signal.SIGHUP
    assert not list(copies.iterdir())
    assert [signal.getsignal(number) for number in END_SIGNALS] == handlers


def test_wrong_commands_are_refused(commands: ChatCommands, capsys: Capture) -> None:
    for line, message in {
        "/clear all": "/clear takes no argument. Write /clear",
        "/open x": "/open takes the number of an image",
        "/open 1": "no image 1. No image has been shown yet",
        "/image": "/image takes a file",
        "/image ~nobody-here/x": "~nobody-here/x: the home folder of this user is unknown",
        "/search": "there is no index to search",
        "/retrieve on": "retrieval: there is no index",
        "/retrieve maybe": "retrieval: 'maybe'. Use off, context or interleave",
        "/scope all": "scope: 'all'. Use last or dialog",
        "/image caf\udce9": "the line is not valid UTF-8",
    }.items():
        with pytest.raises(VLDuetError) as caught:
            commands.run(line)
        assert message in str(caught.value)
    assert not capsys.readouterr().out


def make_hit(text: str, path: str) -> Hit:
    return Hit("a\x1b[2J", 0.5, text, ImageRef(path=Path(path)), {}, 1)


def test_an_interleaved_answer_shows_images_by_number_and_path(
    model: DuetModel, index: Path, script: AnswerScript, tmp_path: Path, capsys: Capture
) -> None:
    hit = make_hit("a \x1b]0;title\x07 red\nsquare", "/photos/a\x1b[31m.png")
    other = make_hit("", "/photos/b.png")
    script.events = [
        *(TextDelta("A\x1b[2J "), TextDelta("square.")),
        *(RetrievedImage(hit, 0, 0.512), RetrievedImage(other, 0, 0.4)),
        *(TextDelta(" Then\nmore."), RetrievedImage(hit, 1, 0.3)),
    ]
    with Index.open(index) as opened:
        settings = ChatSettings(retrieval="interleave")
        session = ChatSession(model, opened, folder=tmp_path, settings=settings)
        ChatCommands(session).run("Show me.")
    assert capsys.readouterr().out == (
        "A [2J square.\n"
        "    image 1 (0.512): /photos/a [31m.png\n"
        "    a ]0;title red square\n"
        "    image 2 (0.400): /photos/b.png\n"
        "Then\nmore.\n"
        "    image 1 (0.300): /photos/a [31m.png\n"
        "    a ]0;title red square\n"
    )


def test_an_answer_without_matches_or_text_says_so(
    model: DuetModel, index: Path, script: AnswerScript, tmp_path: Path, capsys: Capture
) -> None:
    with Index.open(index) as opened:
        settings = ChatSettings(retrieval="context", where=["year>3000"])
        commands = ChatCommands(ChatSession(model, opened, folder=tmp_path, settings=settings))
        commands.run("Anything?")
        commands.run("/search red")
        script.events = []
        commands.run("Nothing?")
    nothing = (
        "Nothing in the index matches.)\n(The model answered nothing: your message is not kept."
    )
    sources = "(No sources: nothing in the index matches.)"
    assert capsys.readouterr().out == f"An answer.\n{sources}\n({nothing})\n"


def test_an_interruption_ends_the_answer_alone(
    commands: ChatCommands, script: AnswerScript, capsys: Capture
) -> None:
    script.events = ["Half", KeyboardInterrupt()]
    assert commands.run("Go on.")
    part = "part of the conversation.)\n"
    assert capsys.readouterr().out == f"Half\n(Interrupted: what was answered is {part}"
    script.events = [KeyboardInterrupt()]
    assert commands.run("Go on.")
    assert "was nothing, and your message is not" in capsys.readouterr().out
    assert len(commands.session.turns) == 2
    with pytest.raises(KeyboardInterrupt):
        ChatCommands(commands.session).run("From a pipe.")


def test_paths_are_read_as_they_are_typed_or_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "it's a photo.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for text, path in {
        "photo.png": "photo.png",
        "it's a photo.png": "it's a photo.png",
        "'my photo.png'": "my photo.png",
        '"my photo.png"': "my photo.png",
        r"my\ photo.png": "my photo.png",
        "my photo.png": "my photo.png",
        "~/photo.png": "/home/me/photo.png",
        "'~/my photo.png'": "/home/me/my photo.png",
        "x" * 5000: "x" * 5000,
        "a\0b": "a\0b",
    }.items():
        assert parse_path(text) == Path(path)
    for text in ("", "''"):
        with pytest.raises(ConfigError, match="/image takes a file"):
            parse_path(text)


def test_images_are_opened_by_number_and_without_a_shell(
    commands: ChatCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    image = paint(tmp_path / "-a; $(b).png", (1, 2, 3))
    monkeypatch.chdir(tmp_path)
    commands.run("/image -a; $(b).png")
    monkeypatch.setattr(chat_commands, "find_viewer", lambda: None)
    commands.run("/open 1")
    monkeypatch.setattr(chat_commands, "find_viewer", lambda: "/usr/bin/viewer")
    started: list[list[str]] = []

    class Process:
        """Program that ends with the status in `outcome`, or goes on."""

        outcome: int | None = None

        def __init__(self, command: list[str], **options: Any):
            assert isinstance(command, list) and not options.get("shell")
            started.append(command)

        def wait(self, timeout: float) -> int:
            if self.outcome is None:
                raise subprocess.TimeoutExpired("viewer", timeout)
            return self.outcome

    monkeypatch.setattr(subprocess, "Popen", Process)
    for Process.outcome in (None, 0, 3):
        commands.run("/open 1")
    assert started == 3 * [["/usr/bin/viewer", str(image)]]
    commands.run("/image -a; $(b).png")
    line = f"image 1: {image}"
    assert capsys.readouterr().out.splitlines() == [
        "image 1 is attached to the next message",
        *("(There is no display to open it on.)", line),
        *(line, line),
        *("(The viewer /usr/bin/viewer failed.)", line),
        "image 1 is attached to the next message, which has 2 images",
    ]


def test_a_desktop_is_needed_to_open_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert viewer.find_viewer() is None
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert viewer.find_viewer() == "/usr/bin/xdg-open"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert viewer.find_viewer() == "/usr/bin/open"


def type_keys(commands: ChatCommands, keys: str) -> None:
    """Run a conversation at a terminal whose user types keys, which must end it."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        run_terminal(commands)


def test_a_terminal_sends_pasted_lines_as_one_message_and_survives_errors(
    commands: ChatCommands, script: AnswerScript, capsys: Capture
) -> None:
    pasted = "\x1b[200~first\nsecond\r\nthird\x1b[201~"
    keys = f"{pasted} end\rone\x1b\rtwo\r/serch\rdropped\x03/retrieve\r\x04"
    type_keys(commands, keys)
    messages = [prompt[-1].parts[-1] for prompt in script.prompts]
    assert messages == ["first\nsecond\nthird end", "one\ntwo"]
    out, err = capsys.readouterr()
    assert "Ctrl-D ends the conversation." in out and out.endswith("retrieval: off\n")
    assert err.startswith("error: unknown command /serch. Did you mean '/search'?")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModelError("broken"), "broken"),
        (MemoryError(), "memory"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
    ],
)
def test_an_answer_that_fails_does_not_end_a_conversation(
    commands: ChatCommands, script: AnswerScript, capsys: Capture, error: Exception, message: str
) -> None:
    script.events = [error]
    type_keys(commands, "Hello\r/quit\r")
    assert message in capsys.readouterr().err


def test_a_mistake_of_the_program_is_raised(commands: ChatCommands, script: AnswerScript) -> None:
    script.events = [ZeroDivisionError("ours")]
    with pytest.raises(ZeroDivisionError):
        type_keys(commands, "Hello\r")


def complete(text: str) -> list[str]:
    """Return the completions of a line, as they would be inserted."""
    document = Document(text, len(text))
    return [item.text for item in CommandCompleter().get_completions(document, CompleteEvent())]


def test_commands_and_their_arguments_are_completed(tmp_path: Path) -> None:
    assert complete("/re") == ["/retrieve"] and complete("/scope ") == ["last", "dialog"]
    (tmp_path / "photo.png").touch()
    assert complete(f"/image {tmp_path}/ph") == ["oto.png"]
    assert not complete("/search a") and not complete("re") and not complete("a\n/re")


def test_help_names_every_command(commands: ChatCommands, capsys: Capture) -> None:
    commands.run("/help")
    commands.run("/clear")
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in chat_commands.USAGE)
    assert out.endswith("A new conversation begins.\n")
