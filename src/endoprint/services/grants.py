"""Who may do what with MLflow's store: a reader reads, a trainer logs, a promoter decides."""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote

from endoprint.config import Refusal
from endoprint.roles import ROLES, password_of

# what each role has on the task's experiment and on its registered model; beyond it, everybody
# who is known reads. Taking an alias away is a deletion to MLflow, hence MANAGE.
GRANTS: dict[str, dict[str, str]] = {
    "reader": {},
    "trainer": {"experiment": "EDIT"},
    "promoter": {"experiment": "EDIT", "registered_model": "MANAGE"},
}
TASK_TAGS = [{"key": "mlflow.experimentKind", "value": "custom_model_development"}]
KNOWN_ALREADY = "RESOURCE_ALREADY_EXISTS"


class Admin:
    """MLflow's server, asked as its administrator."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._name = os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME", "admin")
        # it is on this machine, of which no proxy knows
        self._directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, what: str, payload: dict[str, Any] | None = None) -> Any:
        """Return the server's answer; a user or thing that exists already is no error."""
        secret = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")
        token = base64.b64encode(f"{self._name}:{secret}".encode()).decode()
        request = urllib.request.Request(
            f"{self.url}/api/{what}",
            None if payload is None else json.dumps(payload).encode(),
            {"content-type": "application/json", "authorization": f"Basic {token}"},
        )
        try:
            with self._directly.open(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if KNOWN_ALREADY in said:
                return None
            raise Refusal(
                "MLflow's administrator may grant roles",
                f"HTTP {error.code} from {self.url}: {said[:200]}",
                "set MLFLOW_AUTH_ADMIN_PASSWORD to the one the server was first started with",
            ) from None
        return json.loads(text) if text else None


def grant(url: str, experiment: str) -> list[str]:
    """Make the roles whose password the environment holds, and say which; safe to repeat.

    `experiment`: the name that the task's experiment and registered model share; both are made
    here, since whoever makes a thing owns it.
    """
    admin = Admin(url)
    admin.ask("2.0/mlflow/experiments/create", {"name": experiment, "tags": TASK_TAGS})
    admin.ask("2.0/mlflow/registered-models/create", {"name": experiment})
    found = admin.ask(f"2.0/mlflow/experiments/get-by-name?experiment_name={quote(experiment)}")
    ids = {
        "experiment": str(found["experiment"]["experiment_id"]),
        "registered_model": experiment,
    }
    made = []
    for role in ROLES:
        password = password_of(role)
        if not password:
            continue
        admin.ask("2.0/mlflow/users/create", {"username": role, "password": password})
        for kind, permission in GRANTS[role].items():
            admin.ask(
                "3.0/mlflow/users/permissions/grant",
                {
                    "username": role,
                    "resource_type": kind,
                    "resource_id": ids[kind],
                    "permission": permission,
                },
            )
        made.append(role)
    return made
