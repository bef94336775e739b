"""The page's server, on this machine alone: Python's own, a table behind it, one state an annotator."""

from __future__ import annotations

import datetime
import json
import re
import secrets
import sys
import threading
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeGuard
from urllib.parse import parse_qs, urlsplit

from fedattack.annotation.page import page
from fedattack.annotation.pairs import Picture, png
from fedattack.annotation.plan import Plan, Question, judged, opaque
from fedattack.annotation.rating_file import RatingFile
from fedattack.errors import ConfigError, DataError, FedattackError
from fedattack.reading import parsed_json

HOST = "127.0.0.1"
_LARGEST_BODY = 4096
_OURS = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)


class Refused(Exception):
    """A request that is not answered: its status, and a sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Session:
    """What one annotator has answered and is asked next; read from the table, so that a restart changes nothing."""

    def __init__(self, plan: Plan, table: RatingFile) -> None:
        self.plan, self.table = plan, table
        self._by_name = {question.name: question for question in plan.questions}
        self._practised = 0
        self._mutex = threading.Lock()
        self.pictures: dict[str, Picture | bytes] = {}
        self._sources: dict[str, list[dict[str, Any]]] = {}
        for exercise in plan.exercises:
            self._add(exercise.token, exercise.pictures, exercise.size)
        for question in plan.questions:
            self._add(question.token, question.pictures, question.pictures[0].size)

    def _add(self, token: str, pictures: Sequence[Picture | bytes], size: tuple[int, int]) -> None:
        names = [opaque(f"{token}|{self.plan.digest}|{place}") for place in range(len(pictures))]
        self.pictures |= dict(zip(names, pictures, strict=True))
        self._sources[token] = [
            {"src": f"/image/{name}", "width": size[0], "height": size[1]} for name in names
        ]

    def answered(self) -> list[Question]:
        """Answered questions, in the order of the table's lines."""
        mine = [row for row in self.table.rows if row["annotator_id"] == self.plan.annotator]
        names = dict.fromkeys((row["pair_id"], row["is_attention_check"]) for row in mine)
        return [self._by_name[name] for name in names if name in self._by_name]

    def state(self) -> dict[str, Any]:
        """What the page shows now."""
        answered = self.answered()
        common = {
            "rater": self.plan.annotator,
            "question": self.plan.question,
            "hint": self.plan.hint,
            "options": [{"key": option.key, "text": option.text} for option in self.plan.options],
            "answered": len(answered),
            "total": len(self.plan.questions),
            "can_undo": bool(answered),
        }
        if not answered and self._practised < len(self.plan.exercises):
            exercise = self.plan.exercises[self._practised]
            return common | {
                "phase": "practice",
                "token": exercise.token,
                "pictures": self._sources[exercise.token],
                "right": list(exercise.right),
                "why": exercise.why,
                "position": self._practised + 1,
                "practice": len(self.plan.exercises),
            }
        question = self._next(answered)
        if question is None:
            return common | {"phase": "done"}
        return common | {"phase": "rate", "token": question.token, "pictures": self._sources[question.token]}

    def _next(self, answered: Sequence[Question]) -> Question | None:
        tokens = {question.token for question in answered}
        return next((question for question in self.plan.questions if question.token not in tokens), None)

    def practise(self, token: str | None) -> dict[str, Any]:
        """Go on from a practice screen; from all of them, where `token` is None."""
        with self._mutex:
            exercises = self.plan.exercises
            if token is None:
                self._practised = len(exercises)
            elif self._practised < len(exercises) and exercises[self._practised].token == token:
                self._practised += 1
            return self.state()

    def answer(self, token: str, choice: int, shown_px: int) -> tuple[bool, dict[str, Any]]:
        """Put an answer into the table; whether it was taken (only to what is asked now), and the state."""
        with self._mutex:
            question = self._next(self.answered())
            if question is None or question.token != token:
                return False, self.state()
            row = judged(question.told, self.plan.options[choice], shown_px, timestamp())
            return bool(self.table.append(row)), self.state()

    def undo(self) -> dict[str, Any]:
        """Take back the annotator's last answer."""
        with self._mutex:
            answered = self.answered()
            if answered:
                self.table.remove(answered[-1].told)
            return self.state()


def timestamp() -> str:
    """Now, UTC, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


class RatingServer(ThreadingHTTPServer):
    """Serves plans, one an annotator, to browsers of this machine.

    Parameters
    ----------
    plans : sequence of Plan
        Of different annotators.
    table : RatingFile
        Where answers go.
    port : int
        0: any free one.

    Raises ConfigError where the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, plans: Sequence[Plan], table: RatingFile, port: int = 0) -> None:
        self.sessions = {plan.annotator: Session(plan, table) for plan in plans}
        self.pictures = {
            name: one for session in self.sessions.values() for name, one in session.pictures.items()
        }
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"--port {port}: {error.strerror or error}; give another, or 0 for any free one"
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: RatingServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fedattack", ""
    timeout = 60
    wbufsize = -1  # head and body of a reply in one packet

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, act: Any) -> None:
        try:
            self._check_sender()
            act()
        except Refused as refusal:
            self._json(refusal.status, {"error": str(refusal)})
        except DataError as error:
            self._json(HTTPStatus.CONFLICT, {"error": str(error)})
        except FedattackError as error:  # a full disk: the answer was not taken
            self._json(HTTPStatus.INSUFFICIENT_STORAGE, {"error": f"Nothing was saved: {error}."})

    def _check_sender(self) -> None:
        """Browsers that were led here by another site say so in Host or Origin."""
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(hosts) != 1 or not _OURS.fullmatch(hosts[0]):
            self.close_connection = True
            raise Refused(HTTPStatus.FORBIDDEN, f"this server answers to {self.server.address} only")
        if origin is not None and origin.lower() != f"http://{hosts[0].lower()}":
            self.close_connection = True
            raise Refused(HTTPStatus.FORBIDDEN, "this server answers to its own page only")

    def _get(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/":
            nonce = secrets.token_urlsafe(16)
            policy = (
                f"default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'nonce-{nonce}'; "
                f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            text = page({"raters": list(self.server.sessions)}, nonce)
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", text.encode(), policy)
        elif url.path == "/api/state":
            state = self._session(parse_qs(url.query).get("rater", [""])[0]).state()
            self._json(HTTPStatus.OK, {"state": state})
        elif url.path.startswith("/image/"):
            picture = self.server.pictures.get(url.path.removeprefix("/image/"))
            if picture is None:
                raise Refused(HTTPStatus.NOT_FOUND, "there is no such picture")
            self._send(
                HTTPStatus.OK, "image/png", picture if isinstance(picture, bytes) else png(picture.pixels())
            )
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        if path not in ("/api/answer", "/api/practice", "/api/undo"):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        session = self._session(body.get("rater"))
        if path == "/api/undo":
            self._json(HTTPStatus.OK, {"state": session.undo()})
            return
        token = body.get("token")
        if path == "/api/practice":
            if token is not None and not isinstance(token, str):
                raise Refused(HTTPStatus.BAD_REQUEST, "token: a text is accepted")
            self._json(HTTPStatus.OK, {"state": session.practise(token)})
            return
        choices = len(session.plan.options)
        choice, shown = body.get("choice"), body.get("shown_px")
        if not isinstance(token, str) or not _within(choice, 0, choices - 1) or not _within(shown, 1, 99_999):
            raise Refused(
                HTTPStatus.BAD_REQUEST,
                f"accepted: token, a text; choice, 0 to {choices - 1}; shown_px, 1 to 99999",
            )
        taken, state = session.answer(token, choice, shown)
        self._json(HTTPStatus.OK if taken else HTTPStatus.CONFLICT, {"state": state})

    def _session(self, rater: Any) -> Session:
        session = self.server.sessions.get(rater) if isinstance(rater, str) else None
        if session is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such annotator")
        return session

    def _body(self) -> dict[str, Any]:
        """The request's JSON object; whatever else it is ends the connection, for its end is unknown."""
        length = self.headers.get("Content-Length", "")
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        close, self.close_connection = self.close_connection, True
        if not re.fullmatch(r"\d{1,9}", length) or "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the length of a request must be given")
        if int(length) > _LARGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {_LARGEST_BODY} bytes")
        data = self.rfile.read(int(length))
        if kind != "application/json":
            raise Refused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a request is JSON (Content-Type: application/json)"
            )
        try:
            body = parsed_json(data)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "a request is a JSON object")
        self.close_connection = close
        return body

    def _json(self, status: HTTPStatus, document: Mapping[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(document).encode())

    def _send(self, status: HTTPStatus, kind: str, data: bytes, policy: str = "default-src 'none'") -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a rater's terminal is not a log."""


def _within(value: Any, low: int, high: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
