"""Rounds as NVFlare's controllers run them, with three sites and their updates."""

import torch
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

SITES, STEPS = ("site-1", "site-2", "site-10"), (3, 1, 2)


def contiguous(state):
    return {key: x.contiguous() for key, x in state.items()}


def send(aggregator, model, round=0):
    """What the controllers do with a round's task."""
    aggregator.reset_stats()
    context = FLContext()
    task = FLModelUtils.to_shareable(FLModel(params=model, current_round=round))
    context.set_prop(AppConstants.TRAIN_SHAREABLE, task, private=True, sticky=False)
    aggregator.handle_event(AppEventType.BEFORE_TRAIN_TASK, context)


def answer(name, params, steps=1, **fields):
    meta = {"client_name": name} | ({} if steps is None else {"NUM_STEPS_CURRENT_ROUND": steps})
    return FLModel(params=params, meta=meta, **fields)


def run_round(aggregator, start, updates, round=0, names=SITES, steps=STEPS, **fields):
    send(aggregator, start, round)
    for name, update, n in zip(names, updates, steps, strict=True):
        aggregator.accept_model(answer(name, update, n, **fields))
    return aggregator.aggregate_model()


def equal(a, b):
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def as_arrays(state):
    return {key: x.numpy() for key, x in state.items()}
