"""The step between a round's preparation and its average: refuse clients, weigh them anew, shorten their changes."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters.values import nothing_left
from ..errors import UpdateError
from ..methods.running_mean import shares_of
from ..options import AggregationOptions
from ..ranks.prepare import PreparedRound, drop_invalid
from .choice import Choice
from .clipping import START, clip_clients, clip_factors
from .distances import Distances, adapter_squares, measure_distances, other_squares
from .rules import check_clients, krum_scores, median_weights, nearest


def select_clients(prepared: PreparedRound, options: AggregationOptions) -> tuple[PreparedRound, Choice | None]:
    """Choose which clients of a round count, and how far.

    Clients of weight 0 send no opinion: they are neither compared nor refused.

    Args:
        prepared: the round.
        options: the rule, f and the bound.

    Returns:
        The round of the clients that count, with their weights; a clipped client is mixed with the reference, which then is
        the last client, or its B is shortened. And the choice, None where clients are not compared.

    Raises:
        UpdateError: too few clients for Krum, a client with NaN or Inf (``on_invalid="raise"``), distances that overflow, or
            a bound of zero.
    """
    if not options.compares_clients:
        return prepared, None
    counting = _keep(prepared, [i for i, w in enumerate(prepared.weights) if w > 0])
    check_clients(options, len(counting.clients))
    distances = measure_distances(counting, changes=options.clip is not None, backend=options.backend)
    if not distances.finite:
        valid = drop_invalid(counting, options.on_invalid)
        if valid is counting:
            _refuse_overflow(counting)
        prepared, counting = drop_invalid(prepared, options.on_invalid), valid
        check_clients(options, len(counting.clients))
        distances = measure_distances(counting, changes=options.clip is not None, backend=options.backend)
        if not distances.finite:
            _refuse_overflow(counting)
    return _choose(counting, distances, options)


def _choose(round: PreparedRound, distances: Distances, options: AggregationOptions) -> tuple[PreparedRound, Choice]:
    names, squares = tuple(client.name for client in round.given), distances.squares
    f = check_clients(options, len(names))
    shares = torch.tensor(shares_of(round.weights), dtype=torch.float64, device="cpu")
    scores, refused = None, {}
    if f is not None:
        scores = krum_scores(squares, f)
        chosen = nearest(scores, 1 if options.robust == "krum" else len(names) - f)
        shares = torch.zeros_like(shares).index_copy_(0, torch.tensor(chosen, device="cpu"), shares[chosen])
        refused = _explain(names, scores, chosen)
    elif options.robust == "geometric-median":
        shares = median_weights(squares, shares)
    kept = [i for i, share in enumerate(shares.tolist()) if share > 0]
    if not kept:
        raise nothing_left(round.dropped | refused)
    shares = shares / shares.sum()
    round = replace(_keep(round, kept), weights=shares[kept].tolist())
    choice = Choice(
        options.robust,
        f,
        names,
        tuple(map(tuple, squares.sqrt().tolist())),
        distances.other_weight,
        None if scores is None else tuple(scores.tolist()),
        tuple(shares.tolist()),
        refused,
    )
    if options.clip is None or distances.changes is None:
        return round, choice
    changes = distances.changes.sqrt()
    bound, left = clip_factors(changes, options.clip, names)
    round, in_reference = clip_clients(round, left[kept].tolist())
    if in_reference:
        choice = replace(choice, weights=tuple((shares * left).tolist()), kept=in_reference)
    clipped = {names[i]: float(left[i]) for i in kept if left[i] < 1}
    return round, replace(choice, bound=bound, changes=tuple(changes.tolist()), clipped=clipped)


def _explain(names: Sequence[str], scores: Tensor, chosen: Sequence[int]) -> dict[str, str]:
    """Why the clients that were not chosen are refused."""
    largest = max(float(scores[i]) for i in chosen)
    return {
        name: f"its score is {float(score):.4g}, and at most {largest:.4g} for who counts"
        for i, (name, score) in enumerate(zip(names, scores, strict=True))
        if i not in chosen
    }


def _keep(round: PreparedRound, kept: Sequence[int]) -> PreparedRound:
    """The round of the clients in these places."""
    if len(kept) == len(round.given):
        return round
    s = round.scalings
    return replace(
        round,
        given=[round.given[i] for i in kept],
        clients=[round.clients[i] for i in kept],
        weights=[round.weights[i] for i in kept],
        scalings=None if s is None else replace(s, per_client=[s.per_client[i] for i in kept]),
    )


def _refuse_overflow(round: PreparedRound) -> None:
    """Raise UpdateError for distances that are not finite, of clients that are."""
    names = [client.name for client in round.given]
    squares = [(a.module, D) for a, D in zip(round.layout.adapters, adapter_squares(round, changes=False), strict=True)]
    squares.append(("other tensors", other_squares(round.layout, round.clients)))
    for where, D in squares:
        wrong = ~D.cpu().isfinite()
        if bool(wrong.any()):
            i = int(wrong.sum(1).argmax())
            j = int(wrong[i].nonzero()[0])
            shape = next((f" A (r, {a.d_in}), B ({a.d_out}, r)" for a in round.layout.adapters if a.module == where), "")
            raise UpdateError(
                f"{names[i]}, {where}{shape}: its distance to {names[j]} overflows float64; leave this client out, or scale "
                "its factors"
            )
    raise UpdateError(
        f"the distances of {names[0]} to {names[-1]} overflow float64 when they are summed over the model, or those to "
        f"{START}; leave out the client with the largest entries"
    )
