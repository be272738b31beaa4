"""The job that makes a search's winner a candidate: refitted and judged as any other model."""

from __future__ import annotations

from typing import Any

from endoprint.jobs.deciding import register
from endoprint.jobs.fitting import figures_of, train
from endoprint.jobs.searching import OBJECTIVES


def offer(workspace: str, *, model: str, objective: str = "") -> dict[str, Any]:
    """Refit a search's winner, judge it on every development fold, and make it `@candidate`.

    `objective`: of the study whose winner it is; none told: macro-F1 alone. params.yaml is not
    changed. Returns the fit's run, the version, and what there is to say.
    """
    run_id = train(workspace, model=model, tuned=objective or OBJECTIVES[0])
    version = register(workspace, run_id=run_id)
    quality = figures_of(workspace, run_id)["macro_f1"]
    said = (
        f"@candidate is version {version}: refitted, {quality:.3f} macro-F1 over all development "
        f"folds; run {run_id}\ncompare it with `endoprint leaderboard`, then `endoprint promote`"
    )
    return {"fit_run_id": run_id, "version": version, "said": said}
