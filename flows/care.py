"""How flows fail: what is tried again, and what a person finds when that was not enough."""

from __future__ import annotations

from typing import Any

from prefect import Flow, Task
from prefect.artifacts import TableArtifact
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.tasks import exponential_backoff

from endoprint.config import Away, Refusal

# whose errors may pass
REMOTE = ("mlflow", "optuna", "sqlalchemy", "botocore", "requests", "urllib3")
LASTING = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, TimeoutError)
HOUR_SECONDS = 3600.0


def is_passing(error: object) -> bool:
    """Whether a second try may end otherwise: a refused rule stays broken, a lost line may not."""
    if isinstance(error, Away):
        return True
    if isinstance(error, (Refusal, *LASTING)):
        return False
    status = getattr(error, "get_http_status_code", None)  # a server that said no will again
    if status is not None and status() < 500:
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in REMOTE


def worth_trying_again(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Decide for Prefect whether a failed task is run again."""
    return is_passing(state.result(raise_on_failure=False))


# settings of every task: a store or a disk that is away for a minute ends no night's work
TRIED_AGAIN: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=10),
    "retry_jitter_factor": 0.3,
    "retry_condition_fn": worth_trying_again,
}


def leave_a_note(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Leave a table for a person: what failed, the reason, the next step.

    Prefect names the arguments: a worker tells so of a run whose process died.
    """
    if flow_run.parent_task_run_id is not None:
        return  # the flow that called this one says it
    # a crash carries no error of the flow's own, but Prefect makes one up
    error = None if state.is_crashed() else state.result(raise_on_failure=False)
    if isinstance(error, Refusal):
        reason, step = f"{error.rule}; got {error.got}", error.remedy
    elif isinstance(error, BaseException):
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        step = "read this run's logs, mend the cause, then run the deployment again"
    else:
        reason = state.message or state.name
        step = "nothing, where `endoprint up` is running: it goes on by itself"
    TableArtifact(
        key="failure",
        description=f"**{flow.name} did not finish**: {reason}",
        table=[{"what": flow.name, "reason": reason, "next step": step}],
        flow_run_id=flow_run.id,
    ).create()


NOTED: dict[str, Any] = {"on_failure": [leave_a_note], "on_crashed": [leave_a_note]}
