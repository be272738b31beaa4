"""What runs every night: new data in, a judged model out; nothing, where nothing changed."""

from __future__ import annotations

from prefect import State, flow, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from endoprint import jobs
from flows.care import NOTED
from flows.prepare import prepare
from flows.pretrain import pretrain
from flows.promote import promote
from flows.train import train


@flow(**NOTED)
def nightly(workspace: str = ".", force: bool = False) -> str | State[str]:
    """Prepare, train and promote; return the verdict's path.

    Skips itself, and says so, where data, code and values are those of the last finished night.
    A night that was cut short is gone on with: what it had fitted is not fitted again.
    """
    night = task(jobs.night, name="what changed")(workspace)
    if not night["changed"] and not force:
        said = f"skipped: data, code and values are those of {night['last']}"
        create_markdown_artifact(said, key="nightly", description=said)
        return Completed(name="Skipped", message=said)
    prepare(workspace)
    if jobs.wants_pretraining(workspace):
        pretrain(workspace)
    # one forced night is one flow run, however often that is taken up again
    train(workspace, night=f"forced {runtime.flow_run.id}" if force else night["key"])
    verdict = promote(workspace)
    task(jobs.end_night, name="remember the night")(workspace, night=night)
    changed = night["changed"] or "nothing, but told to"
    create_markdown_artifact(f"done: {verdict}\n\nchanged: {changed}", key="nightly")
    return verdict
