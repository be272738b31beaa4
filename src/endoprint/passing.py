"""Which errors may pass by themselves: a store, a disk or a line that is away for a while."""

from __future__ import annotations

from endoprint.config import Away, Refusal

# whose errors may pass
REMOTE = ("mlflow", "optuna", "sqlalchemy", "botocore", "requests", "urllib3")
LASTING = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, TimeoutError)


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
