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
from endoprint.roles import ROLES, password_name, password_of

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
        name = os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME", "admin")
        self._login = (name, os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", ""))
        # it is on this machine, of which no proxy knows
        self._directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, what: str, payload: dict[str, Any] | None = None, *, method: str = "") -> Any:
        """Return the server's answer; a user or thing that exists already is no error."""
        try:
            return self._ask(what, payload, method=method, login=self._login)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if KNOWN_ALREADY in said:
                return None
            raise Refusal(
                "MLflow's administrator may grant roles",
                f"HTTP {error.code} from {self.url}: {said[:200]}",
                "set MLFLOW_AUTH_ADMIN_PASSWORD to the one the server was first started with"
                if error.code in (401, 403)
                else "mend what it names",
            ) from None

    def admit(self, role: str, password: str) -> None:
        """Make a role's user, or give the one there is this password; refused if that is no use.

        A password is changed where the environment's is a new one, and the old one ends with it.
        """
        user = {"username": role, "password": password}
        if self.ask("2.0/mlflow/users/create", user) is None:
            self.ask("2.0/mlflow/users/update-password", user, method="PATCH")
        try:
            self._ask("2.0/mlflow/users/current", login=(role, password))
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise Refusal(
                f"{role} can log in with {password_name(role)}",
                f"HTTP {error.code} from {self.url}: {said[:200]}",
                "see .endoprint/logs/mlflow.txt",
            ) from None

    def _ask(
        self,
        what: str,
        payload: dict[str, Any] | None = None,
        *,
        method: str = "",
        login: tuple[str, str],
    ) -> Any:
        token = base64.b64encode(":".join(login).encode()).decode()
        request = urllib.request.Request(
            f"{self.url}/api/{what}",
            None if payload is None else json.dumps(payload).encode(),
            {"content-type": "application/json", "authorization": f"Basic {token}"},
            method=method or ("POST" if payload is not None else "GET"),
        )
        with self._directly.open(request, timeout=60) as answer:
            text = answer.read()
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
        admin.admit(role, password)
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
