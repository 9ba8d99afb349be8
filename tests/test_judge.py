"""A judge at a local endpoint reads and grades answers; its replies are kept, and its failures say what to do."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import RunError
from pipelines.evaluation.benchmarks import DATASETS, Dataset
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.judge import Judge, JudgeEndpoint
from pipelines.evaluation.judging import judge_answers
from pipelines.evaluation.predictions import Prediction
from pipelines.evaluation.run import run_evaluation
from pipelines.evaluation.scoring.scores import ScoringRules
from pipelines.evaluation.summary import summarize_result
from tests.support.benchmark_files import make_question, write_tsv
from tests.support.fake_engine import FakeEngineFactory

Answer = Callable[[str], str | int]


class Endpoint(ThreadingHTTPServer):
    """Answers chat completions: `answer` maps a prompt to a reply, or to an HTTP status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Answer = lambda _: "1"
        self.prompts: list[str] = []
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        self.server.prompts.append(prompt)
        self.server.keys.add(self.headers["Authorization"])
        reply = self.server.answer(prompt)
        content = {
            "choices": [{"message": {"content": reply}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 2},
        }
        self.send_response(reply if isinstance(reply, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def make_judge(endpoint: Endpoint, tmp_path: Path, price: tuple[float, float] | None = None) -> Judge:
    return Judge(JudgeEndpoint(endpoint.url, "wise", price), str(tmp_path / "judge" / "cache.json"))


def judge_one(judge: Judge, dataset: Dataset, item: dict[str, Any], answer: str | None) -> dict[str, Any]:
    item = {"index": 0, "question": "Which?", **item}
    return judge_answers(judge, dataset, [item], {"0": answer}, ScoringRules())


CANDIDATES = "['a dog', 'a cat']"
VIDEO_MME = {"duration": "short", "domain": "Knowledge", "sub_category": "Geography", "task_type": "OCR Problems"}
READ: list[tuple[str, dict[str, Any], str]] = [
    ("MMStar", {"A": "a dog", "B": "a cat", "answer": "B"}, "2"),
    ("MMMU_DEV_VAL", {"A": float("nan"), "answer": "12 m", "split": "validation"}, "1"),
    ("HallusionBench", {"index": "a_b_c_1_2_3", "answer": "Yes", "category": "x", "l2-category": "y"}, "1"),
    ("Video-MME", {**VIDEO_MME, "candidates": "['A. a dog.', 'B. a cat.']", "answer": "B"}, "2"),
    ("MVBench", {"task_type": "Moving Count", "candidates": CANDIDATES, "answer": "a cat"}, "2"),
    ("MLVU_MCQ", {"task_type": "count", "candidates": CANDIDATES, "answer": "a cat"}, "It chooses 2."),
    (
        "TempCompass_MCQ",
        {"task_type": "multi-choice", "dim": "order", "candidates": "['A. x', 'B. y']", "answer": "B. y"},
        "2",
    ),
]


@pytest.mark.parametrize(("name", "item", "reply"), READ, ids=[case[0] for case in READ])
def test_the_judge_reads_what_no_rule_can(
    name: str, item: dict[str, Any], reply: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    """The answer is right in words; with the judge's choice it scores, without it does not."""
    endpoint.answer = lambda _: reply
    item = {"index": 0, "question": "Which?", **item}
    index = str(item["index"])
    content = judge_answers(
        make_judge(endpoint, tmp_path), DATASETS[name], [item], {index: "the purring one"}, ScoringRules()
    )
    score = content["rows"][index]
    assert (score[-1] if isinstance(score, list) else score) == 1 and content["unread"]["count"] == 0
    [prompt] = endpoint.prompts
    assert "the purring one" in prompt and "Options:\n1. " in prompt
    assert content["judge"] == "wise"


def test_the_judge_reads_numbers(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda _: "12"
    item = {"question_type": "free_form", "answer_type": "integer", "answer": "12", "task": "t", "skills": "['s']"}
    content = judge_one(make_judge(endpoint, tmp_path), DATASETS["MathVista_MINI"], item, "a dozen of them")
    assert content["rows"] == {"0": ["12", 1]}
    assert "without a decimal point" in endpoint.prompts[0]


@pytest.mark.parametrize("reply", ["0", "none of them", "9", "-1", 400])
def test_an_answer_that_the_judge_cannot_read_stays_wrong(reply: str | int, endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda _: reply
    content = judge_one(make_judge(endpoint, tmp_path), DATASETS["MMStar"], READ[0][1], "the purring one")
    assert content["rows"] == {"0": 0} and content["unread"]["count"] == 1


def test_answers_that_rules_read_are_not_sent(endpoint: Endpoint, tmp_path: Path) -> None:
    for answer in ("B", "A", None, "-"):
        judge_one(make_judge(endpoint, tmp_path), DATASETS["MMStar"], READ[0][1], answer)
    assert endpoint.prompts == []


GRADED: list[tuple[str, dict[str, Any], str, float, float]] = [
    ("MMVet", {"answer": "a cat", "category": "ocr,math"}, "0.7", 0.7, 70.0),
    ("MMBench-Video", {"answer": "a cat", "dimensions": "['Counting']"}, "Grade: 2", 2.0, 2.0),
    ("MLVU_OpenEnded", {"answer": "x", "task_type": "summary", "scoring_points": ""}, "4 5", 9.0, 9.0),
    ("MLVU_OpenEnded", {"answer": "x", "task_type": "sub_scene", "scoring_points": "a; b"}, "2.5, 4", 6.0, 6.0),
    (
        "TempCompass_Captioning",
        {"task_type": "captioning", "dim": "order", "mc_question": "Where?", "mc_answer": "B. left", "answer": ""},
        "B",
        1.0,
        100.0,
    ),
]


@pytest.mark.parametrize(("name", "item", "reply", "grade", "score"), GRADED)
def test_the_judge_grades_free_answers(
    name: str, item: dict[str, Any], reply: str, grade: float, score: float, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.answer = lambda _: reply
    judge = make_judge(endpoint, tmp_path)
    content = judge_one(judge, DATASETS[name], item, "a cat, I think")
    assert content["rows"] == {"0": grade} and content["score"] == pytest.approx(score)
    lowest = 2.0 if name == "MLVU_OpenEnded" else 0.0
    assert judge_one(judge, DATASETS[name], item, None)["rows"] == {"0": lowest}


def test_replies_are_kept_and_their_cost_is_counted(endpoint: Endpoint, tmp_path: Path) -> None:
    first = make_judge(endpoint, tmp_path, (10.0, 100.0)).ask({"a": "What?", "b": "Who?"})
    judge = make_judge(endpoint, tmp_path, (10.0, 100.0))
    assert judge.ask({"a": "What?", "b": "Who?"}) == first and len(endpoint.prompts) == 2
    assert judge.compute_cost(first.values()) == {"prompt_tokens": 200, "completion_tokens": 4, "usd": 0.0024}
    assert "usd" not in make_judge(endpoint, tmp_path).compute_cost(first.values())


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    statuses = iter([429, 503])
    endpoint.answer = lambda _: next(statuses, "1")
    assert make_judge(endpoint, tmp_path).ask({"a": "What?"})["a"].text == "1"
    assert len(endpoint.prompts) == 3


def test_what_fails_says_what_to_do_and_keeps_the_rest(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    endpoint.answer = lambda prompt: 401 if prompt == "last" else "1"
    prompts = {f"{i}": f"prompt {i}" for i in range(20)} | {"last": "last"}
    with pytest.raises(RunError, match="HTTP 401; set OPENAI_API_KEY") as error:
        make_judge(endpoint, tmp_path).ask(prompts)
    assert "secret" not in str(error.value) and endpoint.keys == {"Bearer sk-secret"}
    endpoint.answer = lambda _: "1"
    before = len(endpoint.prompts)
    make_judge(endpoint, tmp_path).ask(prompts)
    assert endpoint.prompts[before:] == ["last"]
    assert not re.search("secret", (tmp_path / "judge" / "cache.json").read_text())


def test_a_server_that_is_no_openai_endpoint_is_named(tmp_path: Path) -> None:
    judge = Judge(JudgeEndpoint("http://127.0.0.1:1/v1", "wise"), str(tmp_path / "cache.json"))
    judge._session.adapters.clear()
    with pytest.raises(RunError, match=r"the judge at http://127\.0\.0\.1:1/v1 does not answer"):
        judge.ask({"a": "What?"})


def test_a_judged_benchmark_is_scored_in_a_run(endpoint: Endpoint, tmp_path: Path) -> None:
    """Both rows have the same question and answer, so one request is made."""
    endpoint.answer = lambda _: "0.5"
    rows = [{**make_question(i), "category": "ocr,math"} for i in range(2)]
    data = write_tsv(tmp_path / "MMVet.tsv", *rows)
    options = {"judge": endpoint.url, "judge_model": "wise", "judge_price": (1.0, 1.0)}
    config = EvaluateConfig(
        model="demo", benchmark="MMVet", input=(str(data),), output=str(tmp_path / "out"), size="1B", **options
    )
    assert run_evaluation(config, make_engine=FakeEngineFactory()).scores == {"MMVet": 50.0}
    assert "judged by wise, with prompts of our own (102 tokens, 0.00 USD)" in (tmp_path / "out/scores.md").read_text()
    run_evaluation(config, make_engine=FakeEngineFactory())
    assert len(endpoint.prompts) == 1


def test_published_values_are_compared_with_what_they_measure(endpoint: Endpoint, tmp_path: Path) -> None:
    """MLVU's second published value is the mean grade of its open half."""
    endpoint.answer = lambda _: "2 2"
    item = {"index": 0, "question": "Which?", "answer": "x", "task_type": "summary"}
    judge, dataset = make_judge(endpoint, tmp_path), DATASETS["MLVU_OpenEnded"]
    result = summarize_result(dataset, [item], {"0": Prediction("a cat")}, ScoringRules(), "1B", judge=judge)
    assert result.score == 4.0 and result.difference == pytest.approx(4.0 - 3.66) and result.standard_error == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "http://127.0.0.1/v1"}, "go together"),
        ({"judge": "127.0.0.1", "judge_model": "wise"}, "give a URL"),
        ({"judge": "http://a/v1", "judge_model": "wise", "judge_price": (1.0,)}, "two numbers"),
    ],
)
def test_a_judge_that_is_half_named_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(model="demo", benchmark="MMVet", input=("x",), output=str(tmp_path), **options)
