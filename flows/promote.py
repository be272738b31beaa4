"""Register the leader, judge it on test units, promote it if the policy and a person allow."""

from __future__ import annotations

import urllib.error
import urllib.request

from prefect import flow, get_run_logger, pause_flow_run, task
from prefect.settings import get_current_settings
from pydantic import BaseModel, Field

from endoprint import jobs
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN

WAIT_SECONDS = 7 * 24 * 3600  # as long as somebody may be away; then the version stays held


class Word(BaseModel):
    """A person's word on a version, as Prefect's UI asks for it."""

    approve: bool = Field(description="yes: it goes live; no: it is rejected")
    why: str = Field(min_length=1, description="kept in the history, under the name you log in by")


@flow(**NOTED)
def promote(workspace: str = ".", version: str = "", wait: bool = False) -> str:
    """Judge a version (the leader, newly registered, unless told); return the verdict's path.

    `wait`: where the policy asks for a person and every gate is passed, this run pauses until
    somebody resumes it in Prefect's UI.
    """
    hour = {"timeout_seconds": HOUR_SECONDS, **TRIED_AGAIN}
    chosen = version or task(jobs.register, name="register", **hour)(workspace)
    verdict: str = task(jobs.promote, name="promote", **hour)(workspace, version=chosen)
    if not wait or not jobs.waits_for_approval(workspace, verdict=verdict):
        return verdict
    approver = whom_the_server_knows()
    if approver is None:
        remedy = "approve it with `endoprint registry approve`, or let Prefect's server ask"
        get_run_logger().warning("held: Prefect's server asks nobody who they are; %s", remedy)
        return verdict
    word = pause_flow_run(wait_for_input=Word, timeout=WAIT_SECONDS, key="approval")
    # not tried again: a word is given once; where acting on it fails, the person is asked anew
    return task(jobs.approve, name="approve", timeout_seconds=HOUR_SECONDS)(
        workspace, version=chosen, why=word.why, declined=not word.approve, vouched=approver
    )


def whom_the_server_knows() -> str | None:
    """Return the name that Prefect's UI and API are entered by; None where anybody enters.

    It is one name for all who hold its password (`PREFECT_SERVER_API_AUTH_STRING`): give it to
    those who approve.
    """
    api = get_current_settings().api
    known = api.auth_string.get_secret_value() if api.auth_string else ""
    if not known or not api.url:
        return None
    try:
        urllib.request.urlopen(f"{api.url}/admin/version", timeout=30).close()
    except urllib.error.HTTPError as refused:
        return known.partition(":")[0] if refused.code == 401 else None
    return None
