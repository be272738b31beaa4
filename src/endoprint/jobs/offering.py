"""The job that makes a search's winner a candidate: refitted and judged as any other model."""

from __future__ import annotations

from typing import Any

from endoprint.jobs.deciding import register
from endoprint.jobs.fitting import figures_of, train


def offer(workspace: str, *, model: str) -> dict[str, Any]:
    """Refit a search's winner, judge it on every development fold, and make it `@candidate`.

    params.yaml is not changed. Returns the fit's run, the version, and what there is to say.
    """
    run_id = train(workspace, model=model, tuned="yes")
    version = register(workspace, run_id=run_id)
    quality = figures_of(workspace, run_id)["macro_f1"]
    said = (
        f"@candidate is version {version}: refitted, {quality:.3f} macro-F1 over all development "
        f"folds; run {run_id}\ncompare it with `endoprint leaderboard`, then `endoprint promote`"
    )
    return {"fit_run_id": run_id, "version": version, "said": said}
