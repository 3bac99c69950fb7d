"""`apr.reason` among the other expressions of a program: several of them, in forks, with roles, images and events."""

from __future__ import annotations

import base64
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sglang as sgl

import sgl_apr as apr
from tests.support.fake_sglang_server import TOKENIZER, SglangServer
from tests.support.processes import until

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("error")]

BUDGET = apr.Budget(tokens=400)


@contextmanager
def served(fake: SglangServer, template: str | None = None) -> Iterator[apr.Endpoint]:
    with (
        fake.in_thread() as url,
        apr.Endpoint(url, chat_template_name=template, tokenizer=TOKENIZER) as endpoint,
    ):
        yield endpoint


def reason(name: str, **options) -> sgl.lang.ir.SglGen:
    return apr.reason(name, **{"budget": BUDGET, **options})


def test_several_reasons_and_gens_one_after_another():
    @sgl.function
    def program(s):
        s += "Q1: " + reason("first") + "\nQ2: " + sgl.gen("between", max_tokens=3)
        s += "\nQ3: " + reason("second") + sgl.select("which", [" a", " b"])
        s["noted"] = "a variable of the program"

    fake = SglangServer()
    with served(fake) as endpoint:
        state = program.run(backend=endpoint)
        first, second = (state.get_meta_info(name)["trajectory"] for name in ("first", "second"))
        text = f"Q1: {first.text}\nQ2: gen\nQ3: {second.text}{state['which']}"
        assert state.text() == text
        assert (state["first"], state["second"], state["between"]) == ("Done.", "Done.", "gen")
        assert state["noted"] == "a variable of the program"
        assert second.prompt == f"Q1: {first.text}\nQ2: gen\nQ3: "
        assert len(second.blocks) == 1, "the blocks before are its prompt"
        assert {key for _, key in fake.bodies} == {endpoint.route(state.stream_executor)}
        for name in ("first", "second"):
            meta = state.get_meta_info(name)
            assert meta["completion_tokens"] == meta["trajectory"].metrics().total
        assert state.get_meta_info("between")["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_reasons_in_forks(stream: bool):
    @sgl.function
    def program(s):
        s += "Q: " + reason("plan")
        for i, part in enumerate(parts := s.fork(2)):
            part += f"\n{i} " + reason("part") + "\n" + reason("more")
        parts.join("gather_variable")
        s += "\n" + " ".join(s["part"]) + sgl.gen("end", max_tokens=3)

    fake = SglangServer()
    with served(fake) as endpoint:
        state = program.run(backend=endpoint, stream=stream)
        assert "".join(state.text_iter()) == state.text()
        assert state["part"] == state["more"] == ["Done."] * 2
        plan = state.get_meta_info("plan")["trajectory"]
        assert state.text() == f"Q: {plan.text}\nDone. Done.{state['end']}"
        shared = TOKENIZER.encode(f"Q: {plan.text}")
        for i, (part, more) in enumerate(
            zip(state.get_meta_info("part"), state.get_meta_info("more"), strict=True)
        ):
            prompt = TOKENIZER.encode(f"\n{i} ")
            assert list(part["trajectory"].spans[0].token_ids) == shared + prompt
            assert more["trajectory"].prompt == f"Q: {plan.text}\n{i} {part['trajectory'].text}\n"
        assert {key for _, key in fake.bodies} == {endpoint.route(state.stream_executor)}


def test_roles():
    @sgl.function
    def program(s):
        s += sgl.system("Be brief.")
        s += sgl.user("Q1?")
        s += sgl.assistant(reason("first"))
        with s.user():
            s += "Q2?"
        with s.assistant():
            s += "Well: " + reason("second")
            s += " " + sgl.gen("end", max_tokens=3)

    with served(SglangServer(), "chatml") as endpoint:
        state = program.run(backend=endpoint)
        first, second = (state.get_meta_info(name)["trajectory"] for name in ("first", "second"))
        texts = ["Be brief.", "Q1?", first.text, "Q2?", f"Well: {second.text} gen"]
        assert [m["content"].strip() for m in state.messages()] == texts
        assert [m["role"] for m in state.messages()] == ["system", "user", "assistant", "user", "assistant"]
        assert second.prompt.endswith("<|im_start|>user\nQ2?<|im_end|>\n<|im_start|>assistant\nWell: ")
        assert second.prompt.startswith(first.prompt + first.text)


# Programs that stream


def test_a_streamed_program_is_read_before_it_comes_to_the_variable():
    may_continue = threading.Event()

    @sgl.function
    def program(s):
        s += "Q: " + sgl.gen("before", max_tokens=3)
        assert may_continue.wait(20)
        for part in (parts := s.fork(2)):
            part += reason("part")
        parts.join("gather_variable")
        with pytest.raises(KeyError):  # and not a wait for itself
            s["another"]
        with pytest.raises(KeyError):
            parts[0]["another"]
        s += reason("late")

    with served(SglangServer()) as endpoint:
        state = program.run(backend=endpoint, stream=True)
        read: list[object] = []
        readers = [
            threading.Thread(target=lambda name=name: read.append(state[name])) for name in ("part", "late")
        ]
        for reader in readers:
            reader.start()
        time.sleep(0.3)
        assert not read
        may_continue.set()
        for reader in readers:
            reader.join(20)
        assert sorted(map(str, read)) == ["Done.", "['Done.', 'Done.']"]
        assert state.error() is None


def test_what_the_function_of_a_streamed_program_raises_is_raised_where_it_is_read():
    @sgl.function
    def program(s):
        s += "Q: " + reason("answer")
        raise ZeroDivisionError("in the program")

    with served(SglangServer()) as endpoint:
        state = program.run(backend=endpoint, stream=True)
        with pytest.raises(ZeroDivisionError, match="in the program"):
            _ = state["never"]
        pieces = []
        with pytest.raises(ZeroDivisionError):
            pieces.extend(state.text_iter())
        assert "Done." in "".join(pieces), "what came before is there"
        assert isinstance(state.error(), ZeroDivisionError)


# Images


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file whose name is short, since messages cut long ones."""
    monkeypatch.chdir(tmp_path)
    Path("cat.png").write_bytes(b"\x89PNG not really")
    return "cat.png"


@pytest.mark.parametrize("stream", [False, True])
def test_a_reason_after_an_image_is_refused_by_name(picture: str, stream: bool):
    @sgl.function
    def program(s):
        s += sgl.user(sgl.image(picture) + "What is this?")
        s += sgl.assistant(reason("answer"))

    fake = SglangServer()
    with served(fake) as endpoint:
        state = program.run(backend=endpoint, stream=stream)
        refusal = r"apr\.reason\('answer'\) follows the image or video '.*cat\.png', expected text only: a trajectory has no images"
        with pytest.raises(apr.AprError, match=refusal):
            _ = state["answer"]
    assert not fake.bodies


def test_a_gen_after_an_image_sends_text_and_the_image(picture: str):
    @sgl.function
    def program(s, images=1):
        for _ in range(images):
            s += sgl.image(picture)
        s += "What is this?" + sgl.gen("answer", max_tokens=3)
        for part in (parts := s.fork(2)):
            part += " So" + sgl.gen("part", max_tokens=2) + sgl.select("which", [" a", " b"])
        parts.join()

    fake = SglangServer()
    with served(fake) as endpoint:
        state = program.run(backend=endpoint)
        assert (state["answer"], state["part"]) == ("gen", ["ge"] * 2)
        assert all("input_ids" not in body for body, _ in fake.bodies)
        data = base64.b64encode(b"\x89PNG not really").decode()
        assert {body["image_data"] for body, _ in fake.bodies} == {data}
        assert {key for _, key in fake.bodies} == {endpoint.route(state.stream_executor)}
        with pytest.raises(
            apr.AprError, match=r"the program has the image or video .*cat.png', .*, expected at most one"
        ):
            _ = program.run(images=2, backend=endpoint)["answer"]


# Waiting in the wrong thread


def test_a_callback_that_waits_for_its_program_is_an_error():
    """It runs in the event loop of the endpoint, which would wait for itself."""
    states: list[sgl.lang.interpreter.ProgramState] = []

    @sgl.function
    def program(s, listens=True):
        states.append(s)
        s += "Q: " + reason("answer", on_event=on_event if listens else None)

    def on_event(event: object) -> None:
        if isinstance(event, apr.Forked):
            wait()

    def read_variable() -> None:
        _ = states[-1]["answer"]

    def run_another() -> None:
        _ = program.run(listens=False, backend=endpoint)["answer"]

    with served(SglangServer()) as endpoint:
        for wait in (read_variable, lambda: states[-1].text(), run_another):  # noqa: B007  # `on_event` calls it
            with pytest.raises(apr.AprError, match=r"waits for a program of the same apr\.Endpoint"):
                _ = program.run(backend=endpoint)["answer"]


# Leaving


def test_an_endpoint_that_nobody_uses_closes_itself(caplog: pytest.LogCaptureFixture):
    """As when another one becomes SGLang's default backend."""

    @sgl.function
    def program(s):
        s += "Q: " + reason("answer")

    before = set(threading.enumerate())
    with SglangServer().in_thread() as url, caplog.at_level("ERROR", "asyncio"):
        endpoint: apr.Endpoint | None = apr.Endpoint(url, tokenizer=TOKENIZER)
        assert endpoint is not None
        session, alive = endpoint.http._session, weakref.ref(endpoint)
        assert program.run(backend=endpoint)["answer"] == "Done."
        endpoint = None
        until(lambda: gc.collect() >= 0 and alive() is None, 5)  # a thread may still be about to end
        until(lambda session=session: session.closed, 5)
        until(lambda: not [t for t in set(threading.enumerate()) - before if t.name == "apr-endpoint"], 5)
        del session
        gc.collect()
    assert "Unclosed" not in caplog.text


def test_a_closed_endpoint_refuses_programs():
    @sgl.function
    def program(s):
        s += "Q: " + reason("answer")
        s += sgl.gen("more", max_tokens=3)

    with served(SglangServer()) as endpoint:
        pass
    for stream in (False, True):
        with pytest.raises(apr.EngineError, match=r"the apr\.Endpoint is closed"):
            _ = program.run(backend=endpoint, stream=stream)["more"]
