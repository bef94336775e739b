"""What raters are asked and what becomes of their answers: pairs, plans, the file, the server, exchange, report."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import multiprocessing
import re
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedattack.annotation import read_table, votes
from fedattack.annotation.exchange import export_page, import_answers, import_released, key_file
from fedattack.annotation.pairs import RatedPair, read_pairs
from fedattack.annotation.plan import Plan, Question, judged, make_plan
from fedattack.annotation.quality import quality
from fedattack.annotation.rating_file import RatingFile
from fedattack.annotation.server import RatingServer
from fedattack.annotation.table import COLUMNS
from fedattack.errors import ConfigError, DataError, RunFailed


def folders(root: Path, count: int = 20, side: int = 8, arms: tuple[str, ...] = ("rec",)) -> list[Path]:
    """A folder of originals and folders of reconstructions, all different, in class folders even/ and odd/."""
    rng = np.random.default_rng(count)
    places = [root / name for name in ("orig", *arms)]
    for place in places:
        for number in range(count):
            file = place / ("even", "odd")[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(file)
    return places


@pytest.fixture
def pairs(tmp_path: Path) -> list[RatedPair]:
    return read_pairs(folders(tmp_path))


# Pairs


def test_folders_are_paired_by_name(tmp_path: Path) -> None:
    found = read_pairs(folders(tmp_path, 12, arms=("noise", "blur")))
    assert len(found) == 24
    assert [pair.original.path.stem for pair in found[:6]] == ["0", "2", "4", "6", "8", "10"]  # not 0, 10, 2
    assert all(pair.original.path.stem == pair.reconstruction.path.stem for pair in found)
    assert {pair.told["attack"] for pair in found} == {"noise", "blur"}
    assert found[0].told["class_label"] == "even"


def test_what_cannot_be_paired_is_named(tmp_path: Path) -> None:
    one, two = folders(tmp_path / "a", 3)

    def refused(sentence: str, *sources: Path, kind: type[Exception] = DataError) -> None:
        with pytest.raises(kind, match=sentence) as told:
            read_pairs(sources)
        assert "\n" not in str(told.value)

    refused("is one folder of pictures", one, kind=ConfigError)
    refused("there is no source", kind=ConfigError)
    refused("no such folder", one, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused("holds no pictures", one, tmp_path / "empty")
    (one / "even" / "0.jpg").write_bytes((one / "even" / "0.png").read_bytes())
    refused("have one name, so that neither can be paired", one, two)
    (one / "even" / "0.jpg").rename(one / "even" / "alone.jpg")
    refused(r"alone\.jpg.* has no picture of its name.*\(4 originals, 3 reconstructions; 1 alone\)", one, two)
    (one / "even" / "alone.jpg").unlink()
    Image.new("L", (9, 8)).save(one / "even" / "2.png")
    refused("has 9x8 pixels and .* has 8x8 pixels", one, two)
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 99)]
    (one / "even" / "2.png").unlink()
    frames[0].save(one / "even" / "2.gif", save_all=True, append_images=frames[1:])
    refused("has 2 frames", one, two)
    (one / "even" / "2.gif").write_bytes(b"GIF89a torn")
    refused("cannot read picture", one, two)


# Plans


def kinds(plan: Plan) -> list[str]:
    return [question.kind for question in plan.questions]


def test_a_plan_asks_every_pair_once_a_tenth_again_and_checks(pairs: list[RatedPair]) -> None:
    plan = make_plan(pairs, "match", "a1", 0)
    assert {kind: kinds(plan).count(kind) for kind in ("pair", "repeat", "identical", "wrong")} == {
        "pair": 20, "repeat": 2, "identical": 1, "wrong": 1,
    }  # fmt: skip
    asked: dict[str, int] = {}
    for place, question in enumerate(plan.questions):
        told, (left, right) = question.told, question.pictures
        assert told["is_attention_check"] == ("0" if question.kind == "pair" else "1")
        if question.kind == "pair":
            asked[told["pair_id"]] = place
        if question.kind == "repeat":
            assert place - asked[told["pair_id"]] >= 5
        if question.kind == "identical":
            assert left.sha256 == right.sha256
        if question.kind == "wrong":
            assert left.path.parent.name != right.path.parent.name  # another class, so another image
    assert len({question.token for question in plan.questions}) == 24
    assert len({question.name for question in plan.questions}) == 24


def test_orders_are_blinded_and_come_again(pairs: list[RatedPair]) -> None:
    def order(annotator: str, seed: int, given: list[RatedPair] = pairs) -> list[str]:
        plan = make_plan(given, "match", annotator, seed)
        return [question.told["pair_id"] for question in plan.questions if question.kind == "pair"]

    assert order("a1", 0) == order("a1", 0)
    assert len({tuple(order(*who)) for who in (("a1", 0), ("a2", 0), ("a1", 1))}) == 3
    assert sorted(order("a1", 0)) == sorted(order("a2", 0))
    assert order("a1", 0) != [
        question.told["pair_id"] for question in make_plan(pairs, "match", "x", 9).questions
    ]
    assert len(order("a1", 0, pairs + pairs[:3])) == 20  # given twice, asked once


def test_recognise_shows_the_reconstruction_alone(pairs: list[RatedPair]) -> None:
    plan = make_plan(pairs, "recognise", "a1", 0)
    assert set(kinds(plan)) == {"pair", "repeat", "identical"}  # nothing is there to be the wrong partner
    for question in plan.questions:
        (shown,) = question.pictures
        name = "original" if question.kind == "identical" else "reconstruction"
        assert str(shown.path) == question.told[f"{name}_path"]
    # An original shows after its reconstruction, and is not practised on either.
    seen: set[str] = set()
    for question in plan.questions:
        if question.kind == "identical":
            assert question.told["original_sha256"] in seen
            seen.add("shown " + question.told["original_sha256"])
        seen.add(question.told["original_sha256"])
        assert question.kind == "identical" or "shown " + question.told["original_sha256"] not in seen
    assert [len(exercise.pictures) for exercise in plan.exercises] == [1] * 5
    assert {exercise.size for exercise in plan.exercises} == {(48, 48)}
    assert [exercise.right for exercise in plan.exercises] == [(0,), (1,), (0,), (1,), (0,)]


def test_a_handful_of_pairs_has_neither_repeats_nor_checks(tmp_path: Path) -> None:
    assert kinds(make_plan(read_pairs(folders(tmp_path, 4)), "match", "a1", 0)) == ["pair"] * 4


def row_of(plan: Plan, question: Question, key: str, second: float = 0) -> dict[str, str]:
    option = next(option for option in plan.options if option.key == key)
    when = f"2025-03-01T12:{int(second) // 60:02d}:{second % 60:06.3f}+00:00"
    return judged(question.told, option, 256, when)


def test_classes_as_answers(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plan = make_plan(pairs, "recognise", "a1", 0, by_class=True)
    assert [(option.key, option.choice) for option in plan.options] == [
        ("1", "odd"), ("2", "even"), ("n", "not recognisable"), ("?", "cannot tell"),
    ]  # fmt: skip
    question = next(one for one in plan.questions if one.kind == "pair" and one.told["class_label"] == "even")
    labels = [row_of(plan, question, option.key)["label"] for option in plan.options]
    assert labels == ["0", "1", "0", ""]
    for exercise in plan.exercises:
        assert len(exercise.right) == 1
    digits = [
        RatedPair(pair.original, pair.reconstruction, {"class_label": str(i % 10)})
        for i, pair in enumerate(pairs)
    ]
    keys = [option.key for option in make_plan(digits, "recognise", "a1", 0, by_class=True).options]
    assert keys == [*"0123456789", "n", "?"]  # a digit is its own key
    with pytest.raises(ConfigError, match="goes with --protocol recognise"):
        make_plan(pairs, "match", "a1", 0, by_class=True)
    many = [
        RatedPair(pair.original, pair.reconstruction, {"class_label": str(i)}) for i, pair in enumerate(pairs)
    ]
    with pytest.raises(ConfigError, match="the pairs have 20 classes"):
        make_plan(many, "recognise", "a1", 0, by_class=True)
    with pytest.raises(ConfigError, match="some pairs have no class"):
        make_plan(
            [RatedPair(p.original, p.reconstruction) for p in pairs], "recognise", "a1", 0, by_class=True
        )


def test_practice_has_certain_answers(pairs: list[RatedPair]) -> None:
    plan = make_plan(pairs, "match", "a1", 0)
    assert len(plan.exercises) == 5
    for exercise in plan.exercises:
        left, right = (np.asarray(Image.open(io.BytesIO(data)), float) for data in exercise.pictures)
        assert left.shape == right.shape == (8, 8)
        assert exercise.why
    same = [exercise.pictures[0] == exercise.pictures[1] for exercise in plan.exercises]
    assert same == [True, False, False, False, False]
    assert [exercise.right for exercise in plan.exercises] == [(0,), (1,), (0,), (1,), (0,)]


# The file


def test_answers_are_appended_once_and_taken_back(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plan, path = make_plan(pairs, "match", "a1", 0), tmp_path / "t.csv"
    file = RatingFile(path, "match")
    rows = [row_of(plan, question, "y", place) for place, question in enumerate(plan.questions[:3])]
    assert [file.append(row) for row in rows] == [1, 1, 1]
    assert file.append(*rows) == 0
    before = path.read_bytes()
    assert file.remove(rows[1])
    assert [row["pair_id"] for row in file.rows] == [rows[0]["pair_id"], rows[2]["pair_id"]]
    assert not file.remove(rows[1])
    lines = before.splitlines(keepends=True)
    assert path.read_bytes() == b"".join([*lines[:2], lines[3]])  # nothing else is touched
    later = rows[0] | {"timestamp": "2025-03-02T00:00:00Z", "label": "0", "choice": "different"}
    assert file.append(later) == 0
    assert file.append(later, replace=True) == 1
    assert file.append(later, replace=True) == 0
    found = votes(read_table(path)).set_index("pair_id")
    assert found.loc[rows[0]["pair_id"], "majority"] == 0  # the last counts
    assert not [name for name in read_table(path)["original_path"] if not Path(name).is_file()]
    assert "," + "orig/" in path.read_text()


def test_a_torn_end_is_overwritten_and_an_unended_line_kept(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plan, path = make_plan(pairs, "match", "a1", 0), tmp_path / "t.csv"
    rows = [row_of(plan, question, "y") for question in plan.questions[:3]]
    RatingFile(path, "match").append(rows[0])
    whole = path.read_bytes()
    path.write_bytes(whole + b"1,half an answ")
    file = RatingFile(path, "match")
    assert file.notes == [f"the last line of {path} was torn (14 characters) and is dropped"]
    assert file.append(rows[1]) == 1
    two = path.read_bytes()
    assert two.startswith(whole)
    assert b"half" not in two
    path.write_bytes(two[:-1])  # an editor took the last end of line away
    assert RatingFile(path, "match").append(rows[2]) == 1
    assert len(read_table(path)) == 3


def test_a_full_disk_takes_no_answer_and_tears_nothing(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plan, path = make_plan(pairs, "match", "a1", 0), tmp_path / "t.csv"
    rows = [row_of(plan, question, "y", place) for place, question in enumerate(plan.questions[:3])]
    file = RatingFile(path, "match")
    file.append(rows[0])
    before = path.read_bytes()
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's own: an error, not the end
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, hard))  # room for a part of a line
    try:
        with pytest.raises(RunFailed, match="cannot write"):
            file.append(rows[1])
        with served([plan], file) as port:
            reply = ask(
                port,
                "POST",
                "/api/answer",
                {"rater": "a1", "token": plan.questions[1].token, "choice": 0, "shown_px": 9},
            )
        assert reply[0] == 507
        assert reply[1]["error"].startswith("Nothing was saved: cannot write")
        assert path.read_bytes() == before
        assert file.remove(rows[0])  # the last answer can be taken back even so
        assert path.read_bytes() == before.splitlines(keepends=True)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.append(rows[0]) == 1
    assert path.read_bytes() == before
    assert file.append(rows[1]) == 1
    assert len(read_table(path)) == 2


def _append_many(path: Path, plan: Plan) -> None:
    file = RatingFile(path, "match")
    for question in plan.questions:
        file.append(row_of(plan, question, "y"))


def test_processes_write_one_table_together(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plans = [
        make_plan(pairs, "match", name, 0) for name in ("a1", "a2", "a2")
    ]  # one rates in two places at once
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(tmp_path / "t.csv", plan)) for plan in plans]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    frame = read_table(tmp_path / "t.csv")
    assert frame["annotator_id"].value_counts().to_dict() == {"a1": 24, "a2": 24}
    assert not frame.duplicated(["annotator_id", "pair_id", "is_attention_check"]).any()


def test_tables_that_cannot_be_appended_to(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plan, path = make_plan(pairs, "recognise", "a1", 0), tmp_path / "t.csv"
    RatingFile(path, "recognise").append(row_of(plan, plan.questions[0], "y"))
    with pytest.raises(ConfigError, match="protocol recognise, which are never pooled with those of match"):
        RatingFile(path, "match")
    with pytest.raises(ConfigError, match=r"appended to a \.csv file"):
        RatingFile(tmp_path / "t.parquet", "match")
    path.write_text(",".join(reversed(COLUMNS)) + "\n")
    with pytest.raises(DataError, match="columns in another order"):
        RatingFile(path, "match")


# The server


@contextlib.contextmanager
def served(plans: list[Plan], file: RatingFile) -> Iterator[int]:
    with RatingServer(plans, file) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and decoded body of one request, sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    told = ({"Content-Type": "application/json"} if data is not None else {}) | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    connection.request(method, path, data, told)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, json.loads(content) if reply.getheader(
        "Content-Type"
    ) == "application/json" else content


@pytest.fixture
def site(tmp_path: Path, pairs: list[RatedPair]) -> Iterator[tuple[int, Plan, Path]]:
    plan, path = make_plan(pairs, "match", "a1", 0), tmp_path / "t.csv"
    with served([plan, make_plan(pairs, "match", "a2", 0)], RatingFile(path, "match")) as port:
        yield port, plan, path


def test_a_rating_from_practice_to_the_end(site: tuple[int, Plan, Path], pairs: list[RatedPair]) -> None:
    port, plan, path = site
    state = ask(port, "GET", "/api/state?rater=a1")[1]["state"]
    for number in range(5):
        assert (state["phase"], state["position"]) == ("practice", number + 1)
        assert ask(port, "GET", state["pictures"][0]["src"])[1].startswith(b"\x89PNG")
        state = ask(port, "POST", "/api/practice", {"rater": "a1", "token": state["token"]})[1]["state"]
    for number, question in enumerate(plan.questions):
        assert (state["phase"], state["answered"], state["token"]) == ("rate", number, question.token)
        for shown, picture in zip(state["pictures"], question.pictures, strict=True):
            status, data = ask(port, "GET", shown["src"])
            assert status == 200
            np.testing.assert_array_equal(
                np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture.pixels())
            )
        body = {"rater": "a1", "token": question.token, "choice": number % 3, "shown_px": 256}
        status, reply = ask(port, "POST", "/api/answer", body)
        assert status == 200
        assert len(path.read_text().splitlines()) == number + 2  # on disk before the reply
        assert ask(port, "POST", "/api/answer", body)[0] == 409  # answered already: not taken twice
        state = reply["state"]
    assert state["phase"] == "done"
    frame = read_table(path)
    assert frame["choice"].tolist() == [("same", "different", "cannot tell")[i % 3] for i in range(24)]
    assert set(frame["shown_px"]) == {256}
    assert ask(port, "GET", "/api/state?rater=a2")[1]["state"]["phase"] == "practice"  # each has their own
    state = ask(port, "POST", "/api/undo", {"rater": "a1"})[1]["state"]
    assert (state["phase"], state["token"], state["answered"]) == ("rate", plan.questions[-1].token, 23)
    state = ask(port, "POST", "/api/undo", {"rater": "a1"})[1]["state"]
    assert state["token"] == plan.questions[-2].token


def test_what_is_shown_tells_nothing(site: tuple[int, Plan, Path]) -> None:
    port, plan, _ = site
    ask(port, "POST", "/api/practice", {"rater": "a1", "token": None})
    state = ask(port, "GET", "/api/state?rater=a1")[1]["state"]
    question = plan.questions[0]
    known = [value for value in question.told.values() if len(value) > 3] + [
        "rec",
        "even",
        "odd/",
        question.kind,
    ]
    secret = [value for value in known if value not in ("match",)]
    text = json.dumps({"token": state["token"], "pictures": state["pictures"]})
    assert not [value for value in secret if value in text]
    sources = [shown["src"] for shown in state["pictures"]]
    assert len(set(sources)) == 2
    assert all(re.fullmatch(r"/image/[0-9a-f]{24}", source) for source in sources)


def test_foreign_requests_are_refused(site: tuple[int, Plan, Path]) -> None:
    port, plan, path = site
    before = path.read_bytes()
    good = {"rater": "a1", "token": plan.questions[0].token, "choice": 0, "shown_px": 256}
    ask(port, "POST", "/api/practice", {"rater": "a1", "token": None})
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil.example",
    ):
        for request in (("GET", "/"), ("GET", "/api/state?rater=a1"), ("POST", "/api/answer", good)):
            status, reply = ask(port, *request, Host=host)
            assert status == 403
            assert "answers to http://127.0.0.1:" in reply["error"]
    for origin in (
        "http://evil.example",
        "null",
        f"https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
        f"http://localhost:{port}",
    ):
        status, reply = ask(port, "POST", "/api/answer", good, Origin=origin)
        assert (status, reply["error"]) == (403, "this server answers to its own page only")
    assert (
        ask(port, "POST", "/api/answer", good, Content_Type="text/plain")[0] == 415
    )  # a form needs no preflight
    assert path.read_bytes() == before
    assert ask(port, "POST", "/api/answer", good, Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert ask(port, "GET", "/", Host=f"localhost:{port}")[0] == 200


def test_odd_requests(site: tuple[int, Plan, Path]) -> None:
    port, plan, path = site
    before, token = path.read_bytes(), plan.questions[0].token
    absent = (
        "/../t.csv /image/../../t.csv /image/..%2f..%2ft.csv /image/ /t.csv //t.csv /api/state /api/state?rater=a3 "
        f"/api/answer /page.js /image/{'0' * 24} /image/{token}"
    )
    for target in absent.split():
        assert ask(port, "GET", target)[0] == 404, target
    assert ask(port, "POST", "/api/other", {"rater": "a1"})[0] == 404
    assert ask(port, "POST", "/api/undo", {"rater": ["a1"]})[0] == 404
    good: dict[str, Any] = {"rater": "a1", "token": token, "choice": 0, "shown_px": 256}
    odd: dict[str, list[Any]] = {"choice": [3, -1, True, "0"], "shown_px": [0, 1e9, None], "token": [None, 5]}
    for change in [{name: value} for name, values in odd.items() for value in values]:
        assert ask(port, "POST", "/api/answer", good | change)[0] == 400, change
    assert ask(port, "POST", "/api/answer", good | {"token": "0" * 24})[0] == 409
    for data in (b"{", b"[]", b"\xff", b"[" * 4000):
        assert ask(port, "POST", "/api/answer", data)[0] == 400
    assert ask(port, "POST", "/api/answer", b" " * 4097)[0] == 413
    assert ask(port, "POST", "/api/answer", b"", Content_Length="-1")[0] == 411
    assert path.read_bytes() == before
    with socket.create_connection(("127.0.0.1", port)) as raw:  # goes away in the middle
        raw.sendall(b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
    assert ask(port, "GET", "/api/state?rater=a1")[0] == 200


def test_the_page_may_load_nothing_from_elsewhere(site: tuple[int, Plan, Path]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site[0], timeout=10)
    connection.request("GET", "/")
    reply = connection.getresponse()
    text = reply.read().decode()
    policy = reply.getheader("Content-Security-Policy") or ""
    connection.close()
    assert policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'nonce-([\w-]+)'", policy)[1] in text  # type: ignore[index]
    assert not re.search(r"(src|href)=\"?(https?:)?//", text)
    assert "/*" + "DATA*/" not in text


def test_a_changed_picture_is_not_shown_as_the_old_one(site: tuple[int, Plan, Path]) -> None:
    port, plan, _ = site
    ask(port, "POST", "/api/practice", {"rater": "a1", "token": None})
    state = ask(port, "GET", "/api/state?rater=a1")[1]["state"]
    Image.new("L", (8, 8)).save(plan.questions[0].pictures[0].path)
    status, reply = ask(port, "GET", state["pictures"][0]["src"])
    assert status == 409
    assert "changed while it was being rated" in reply["error"]


def test_a_busy_port_is_one_sentence(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plan = make_plan(pairs, "match", "a1", 0)
    file = RatingFile(tmp_path / "t.csv", "match")
    with (
        served([plan], file) as port,
        pytest.raises(ConfigError, match=f"--port {port}: Address already in use; give"),
    ):
        RatingServer([plan], file, port)


# Exchange


def returned(file: Path, page: str, plan: Plan, choices: list[int], second: int = 0) -> Path:
    """The file that the exported page downloads after so many answers."""
    answers = [
        {
            "token": question.token,
            "choice": choice,
            "shown_px": 160,
            "timestamp": f"2025-03-01T12:00:{second + place:02d}.000Z",
        }
        for place, (question, choice) in enumerate(zip(plan.questions, choices, strict=False))
    ]
    file.write_text(
        json.dumps({"format": 1, "export": page, "annotator": plan.annotator, "answers": answers})
    )
    return file


def test_export_and_import(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plans = [make_plan(pairs, "match", name, 0) for name in ("a1", "a2")]
    table, page = tmp_path / "t.csv", tmp_path / "page.html"
    key = export_page(plans, page, table)
    text = page.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert data["raters"] == ["a1", "a2"]
    assert [len(plan["questions"]) for plan in data["plans"].values()] == [24, 24]
    assert "connect-src" not in text
    assert "default-src 'none'" in text
    assert not [
        word
        for word in ("orig/", "rec/", "pair_id", 'repeat"', "wrong", plans[0].questions[0].told["pair_id"])
        if word in json.dumps(data)
    ]
    shown = data["plans"]["a1"]["questions"][0]["pictures"][0]
    pixels = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(data["pictures"][shown]["src"].partition(",")[2])))
    )
    np.testing.assert_array_equal(pixels, np.asarray(plans[0].questions[0].pictures[0].pixels()))
    before = key.read_bytes(), page.read_bytes()
    export_page(plans, page, table)
    assert (key.read_bytes(), page.read_bytes()) == before

    file = returned(tmp_path / "a1.json", data["export"], plans[0], [0] * 10)
    assert import_answers(file, table) == (10, 10, "a1")
    once = table.read_bytes()
    assert import_answers(file, table) == (0, 10, "a1")  # twice is once
    assert table.read_bytes() == once
    returned(file, data["export"], plans[0], [0] * 24)  # went on, and sent all of it again
    assert import_answers(file, table) == (14, 24, "a1")
    changed = returned(tmp_path / "more.json", data["export"], plans[0], [1], second=50)  # changed their mind
    assert import_answers(changed, table) == (1, 1, "a1")
    assert import_answers(returned(tmp_path / "a2.json", data["export"], plans[1], [2] * 24), table)[0] == 24
    frame = read_table(table)
    assert len(frame) == 49
    first = votes(frame).set_index("pair_id").loc[plans[0].questions[0].told["pair_id"]]
    assert (first["k"], first["n"], first["undecided"]) == (0, 1, 1)


def test_returned_files_are_checked_before_anything_is_merged(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plan, table = make_plan(pairs, "match", "a1", 0), tmp_path / "t.csv"
    name = export_page([plan], tmp_path / "page.html", table).stem
    good = json.loads(returned(tmp_path / "f.json", name, plan, [0, 0]).read_text())
    answer = good["answers"][1]
    file = tmp_path / "g.json"
    for change, sentence in (
        ({"answers": [good["answers"][0], answer | {"token": "x"}]}, "answer 2: token = 'x' is none of"),
        ({"answers": [good["answers"][0], answer | {"choice": 3}]}, "answer 2: choice = 3; accepted: 0 to 2"),
        ({"answers": [answer | {"timestamp": "noon"}]}, "answer 1: timestamp = 'noon'"),
        ({"answers": [answer | {"shown_px": "<b>"}]}, "answer 1: shown_px = '<b>'"),
        ({"annotator": "mallory"}, "annotator 'mallory' was not asked; the export asks a1"),
        ({"export": "../../x"}, "is no file of answers"),
        ({"format": 2}, "is no file of answers"),
        ({"answers": ["x"]}, "is no file of answers"),
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=re.escape(sentence)):
            import_answers(file, table)
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match="more than 64 deep"):
        import_answers(file, table)
    file.write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        import_answers(file, table)
    file.write_text(json.dumps(good))
    with pytest.raises(ConfigError, match=r"whose key .* is missing: give the --table"):
        import_answers(file, tmp_path / "other.csv")
    assert not table.exists()
    assert key_file(table, name).is_file()
    RatingFile(table, "recognise").append(
        row_of(make_plan(pairs, "recognise", "z", 0), plan.questions[0], "y") | {"protocol": "recognise"}
    )
    with pytest.raises(ConfigError, match="never pooled"):
        import_answers(file, table)


def released(root: Path) -> Path:
    rng = np.random.default_rng(5)
    for name in ("7/7_ori.png", "7/b.png", "7/a.png", "-7/c.png", "12/x_ori.png", "12/y.png", "others/z.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name)
    return root


def test_a_released_folder(tmp_path: Path) -> None:
    root, table = released(tmp_path / "release"), tmp_path / "t.csv"
    assert import_released(root, table) == (4, 4, 1)
    assert import_released(root, table) == (0, 4, 1)
    found = votes(read_table(table))
    names = [
        (Path(row.original_path).name, Path(row.reconstruction_path).name, row.majority)
        for row in found.itertuples()
    ]
    assert names == [
        ("7_ori.png", "a.png", 1),
        ("7_ori.png", "b.png", 1),
        ("7_ori.png", "c.png", 0),
        ("x_ori.png", "y.png", 1),
    ]
    (root / "7" / "second_ori.png").write_bytes((root / "7" / "a.png").read_bytes())
    with pytest.raises(DataError, match=r"holds 2 originals \*_ori\.png; one is expected"):
        import_released(root, table)
    (root / "-9").mkdir()
    with pytest.raises(DataError, match="has no 9/ beside it"):
        import_released(root, table)
    with pytest.raises(DataError, match="has no sub-folder <id>/"):
        import_released(tmp_path, table)


# Quality


def test_quality_counts_checks_repeats_and_fast_answers(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plan = make_plan(pairs, "match", "a1", 0)
    file = RatingFile(tmp_path / "t.csv", "match")
    moment, fast = 0.0, 0
    for number, question in enumerate(plan.questions):
        key = {"identical": "n", "wrong": "n"}.get(question.kind, "y")  # fails the identical pair alone
        if question.kind == "repeat" and kinds(plan).index("repeat") == number:
            key = "n"  # and contradicts itself once
        quick = number in (3, 4, 11)
        moment, fast = moment + (0.3 if quick else 2), fast + quick
        file.append(row_of(plan, question, key, moment))
    other = make_plan(pairs, "match", "a2", 0)
    for number, question in enumerate(other.questions):
        key = {"identical": "y", "wrong": "?"}.get(
            question.kind, "y" if question.told["class_label"] == "even" else "n"
        )
        file.append(row_of(other, question, key, 2 * number))
    (found,) = quality(read_table(file.path))
    one, two = found.annotators
    assert (one.name, one.rated, one.checks, one.repeats, one.fast, one.answers) == (
        "a1",
        20,
        (1, 2),
        (1, 2),
        3,
        24,
    )
    assert (two.name, two.rated, two.checks, two.repeats, two.fast) == ("a2", 20, (1, 2), (0, 2), 0)
    assert (found.pairs, found.tied, found.majority) == (20, 10, (10, 0))
    assert found.alpha is not None
    assert found.kappa is not None
    # 20 pairs, 40 labels of which 30 are 1; ten pairs disagree: 1 - (20 / 40) / (2 * 30 * 10 / (40 * 39)).
    assert found.alpha.mean == pytest.approx(1 - 0.5 / (600 / (40 * 39)))
    assert found.kappa.mean == pytest.approx((0.5 - 0.625) / (1 - 0.625))


def test_proxies_stand_apart(tmp_path: Path, pairs: list[RatedPair]) -> None:
    plan, file = make_plan(pairs, "match", "a1", 0), RatingFile(tmp_path / "t.csv", "match")
    for number, question in enumerate(plan.questions):
        row = row_of(plan, question, "y", number)
        file.append(row, row | {"annotator_id": "cnn-0", "annotator_type": "proxy", "proxy_name": "cnn"})
    people, proxies = quality(read_table(file.path))
    assert (people.kind, proxies.kind) == ("human", "proxy")
    assert people.alpha is None  # one person agrees with nobody
    assert proxies.annotators[0].name == "cnn-0"
