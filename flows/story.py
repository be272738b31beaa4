"""The whole story as one flow: `python -m flows.story` is what `make demo` runs."""

from __future__ import annotations

import sys
import time

from prefect import flow, runtime, task

from endoprint import jobs
from flows.care import NOTED
from flows.gpu import a_turn


@flow(**NOTED)  # no step is tried again: whoever asked for a story waits for it
def story(workspace: str = ".") -> str:
    """Walk the job list from cells to scored cells; return the path of `story.json`."""
    began = time.time()
    with a_turn():
        told = {
            step.name: task(step.job, name=step.name)(workspace, **step.arguments)
            for step in jobs.story_steps(workspace)
        }
    tell = task(jobs.tell, name="tell")
    return tell(workspace, told=told, flow_run_id=str(runtime.flow_run.id), began=began)


if __name__ == "__main__":
    from endoprint.cli.story import run_flow

    sys.exit(run_flow("flows.story", "story"))
