"""What all ranks tell each other, by formula: collectives, and the bytes that each rank sends in them."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from cmae_scale.config.sizes import read_size
from cmae_scale.sizing.parameters import count_parameters
from cmae_scale.sizing.zero import Job, count_gradient_bytes

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "rounds"]
RING_RANKS = 64  # up to which they agree by an all-reduce. Source: core/collectives.py
QUESTIONS = 1024  # of a rank at a time, and
QUESTIONS_AT_ONCE = 8192  # of all ranks. Source: CHUNK and AT_ONCE of tasks/evaluator.py
_FP32, _LABEL = 4, 8


class Talk(NamedTuple):
    """`calls` collectives, into which a rank brings `own_bytes` altogether; None: as many as buckets fill."""

    what: str
    when: str
    kind: Kind
    calls: int | None
    own_bytes: int
    reason: str


def count_sent(talk: Talk, *, ranks: int) -> int:
    """Bytes that a rank sends, of a ring or of direct sends, which are the fewest there can be.

    Source: Thakur, Rabenseifner, Gropp (2005), Optimization of collective communication operations in MPICH,
    section 4.
    """
    share = (ranks - 1) / ranks
    factors = {
        "all_reduce": 2 * share,  # a reduce-scatter, then an all-gather
        "all_gather": ranks - 1,  # its own part passes every other rank
        "reduce_scatter": share,
        "all_to_all": share,  # all but what is its own
        "rounds": (ranks - 1).bit_length(),  # all it knows, to one other rank in each
    }
    return round(factors[talk.kind] * talk.own_bytes)


def list_talks(job: Job) -> list[Talk]:
    """All that ranks tell each other in a step, and in a round of nearest neighbours if the run asks them."""
    if job.zero.ranks == 1:
        return []
    return [_agree(job.zero.ranks), *_reduce(job), *_contrast(job), *_average(job), *_find_neighbours(job)]


def _agree(ranks: int) -> Talk:
    kind: Kind = "all_reduce" if ranks <= RING_RANKS else "rounds"
    return Talk(
        "agreement", "step", kind, 1, 3 * 8, "int64: which rank failed, who is to stop, who still saves"
    )


def _reduce(job: Job) -> Iterator[Talk]:
    """Gradients, and weights where ranks have parts of them; `calls` are as many as buckets fill.

    Source: deepspeed/runtime/zero/stage_1_and_2.py: also where every rank keeps a part alone, whole buckets
    are all-reduced; stage 1 does so once a step, stage 2 after each micro-batch. Of stage 3 it is the most:
    ZeRO (arXiv:1910.02054) section 7, weights gathered for forward and once more for backward.
    """
    counts, size, passes = count_parameters(job.cfg), job.formats.parameter_bytes, job.batch.accumulation
    part, gradients = job.zero.share(counts.trained) * size, count_gradient_bytes(job)
    match job.zero.stage:
        case 0:
            yield Talk("gradients", "step", "all_reduce", None, counts.trained * size, "of all micro-batches")
        case 1 | 2:
            times = passes if job.zero.stage == 2 else 1
            yield Talk("gradients", "step", "all_reduce", None, times * gradients, "whole buckets")
            yield Talk("weights", "step", "all_gather", None, part, "a rank's part, once updated")
        case _:
            yield Talk("gradients", "step", "reduce_scatter", None, passes * gradients, "each micro-batch")
            parts = passes * (2 * part + job.zero.share(counts.target) * size)
            yield Talk("weights", "step", "all_gather", None, parts, "at most: forward and backward")


def _contrast(job: Job) -> Iterator[Talk]:
    cfg, batch, ranks = job.cfg, job.batch, job.zero.ranks
    if not cfg.has_contrast:
        return
    keys = batch.local * cfg.heads.out_dim * job.formats.parameter_bytes
    yield Talk("keys", "step", "all_gather", 1, keys, "a rank's own, of all its micro-batches at once")
    if cfg.heads.norm != "sync_batch":
        return
    statistics = 2 * cfg.heads.hidden_dim * _FP32  # mean and squared deviation
    passes = batch.accumulation
    forward = 3 * passes
    yield Talk(
        "batch norm forward", "step", "all_gather", forward, forward * statistics, "of three heads, each pass"
    )
    kind: Kind = "reduce_scatter" if job.device == "cuda" else "all_reduce"
    backward = 2 * passes
    yield Talk(
        "batch norm backward",
        "step",
        kind,
        backward,
        backward * statistics * ranks,
        "of two heads that learn, each rank's statistics",
    )


def _average(job: Job) -> Iterator[Talk]:
    """Under autocast the target is fp32 and every rank averages its own; so it is under ZeRO-3."""
    target = count_parameters(job.cfg).target
    size = job.formats.parameter_bytes
    if target and size < _FP32 and job.zero.stage in (1, 2):
        yield Talk(
            "moving average", "step", "all_reduce", None, target * size, "parts of masters, brought together"
        )


def _find_neighbours(job: Job) -> Iterator[Talk]:
    knn = job.cfg.monitor.knn
    if knn is not None:
        yield from ask_neighbours(k=knn.k, width=read_size(job.cfg.model).embed_dim, ranks=job.zero.ranks)


def ask_neighbours(*, k: int, width: int, ranks: int) -> list[Talk]:
    """One round of questions, which are features of so many numbers."""
    when, chunk = "round of neighbours", count_questions(ranks)
    return [
        Talk("questions", when, "all_gather", 1, chunk * width * _FP32, "every rank has other voters"),
        Talk("answers", when, "all_to_all", 2, ranks * chunk * k * (_FP32 + _LABEL), "to who asked, alone"),
    ]


def count_questions(ranks: int) -> int:
    """Questions of each rank in a round."""
    return max(1, min(QUESTIONS, QUESTIONS_AT_ONCE // ranks))
