"""Plain functions that compose the rooms: strings in, strings out.

The command line and the Prefect flows call these and nothing below them. Names, paths and ids
cross their borders, never arrays. Modules are imported where they are used, so that importing
`jobs` costs nothing and `endoprint --help` answers at once.
"""

from endoprint.jobs.data import (
    attach,
    audit,
    audit_file,
    check,
    curate,
    init,
    prepare,
    simulate,
    simulate_to,
    split,
    stops,
    tokenise,
    tokenize_file,
)
from endoprint.jobs.deciding import (
    approve,
    card,
    promote,
    register,
    retire,
    rollback,
    waits_for_approval,
)
from endoprint.jobs.elsewhere import leaderboard_by
from endoprint.jobs.embedding import embed
from endoprint.jobs.fitting import figures_of, leaderboard, train
from endoprint.jobs.inbox import score_inbox
from endoprint.jobs.live import gc
from endoprint.jobs.negatives import strangers, strangers_of
from endoprint.jobs.nights import end_night, night, wants_pretraining
from endoprint.jobs.offering import offer
from endoprint.jobs.pretraining import backbone_of, backbones, pretrain
from endoprint.jobs.records import history, lineage, plan, seen, verify, who
from endoprint.jobs.reproducing import reproduce
from endoprint.jobs.running import has_files, recover, status
from endoprint.jobs.scoring import evaluate_scores, plan_scoring, score, score_part
from endoprint.jobs.searching import search, search_result
from endoprint.jobs.searching_all import (
    refuse_more_than_a_budget,
    search_all,
    search_all_result,
)
from endoprint.jobs.sharing import pull
from endoprint.jobs.story import (
    Step,
    last_screen,
    leaderboard_screen,
    model_names,
    story_steps,
    tell,
)

__all__ = [
    "Step",
    "approve",
    "attach",
    "audit",
    "audit_file",
    "backbone_of",
    "backbones",
    "card",
    "check",
    "curate",
    "embed",
    "end_night",
    "evaluate_scores",
    "figures_of",
    "gc",
    "history",
    "has_files",
    "init",
    "last_screen",
    "leaderboard",
    "leaderboard_by",
    "leaderboard_screen",
    "lineage",
    "model_names",
    "night",
    "offer",
    "plan",
    "plan_scoring",
    "prepare",
    "pretrain",
    "promote",
    "pull",
    "recover",
    "register",
    "reproduce",
    "retire",
    "rollback",
    "score",
    "score_inbox",
    "score_part",
    "search",
    "refuse_more_than_a_budget",
    "search_all",
    "search_all_result",
    "search_result",
    "seen",
    "simulate",
    "simulate_to",
    "split",
    "status",
    "stops",
    "story_steps",
    "strangers",
    "strangers_of",
    "tell",
    "tokenise",
    "tokenize_file",
    "train",
    "verify",
    "waits_for_approval",
    "wants_pretraining",
    "who",
]
