"""The seam for planted faults: it shows every activation, changes what a hook changes, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from apr_core.engines.load import load_model
from apr_core.engines.wrap import At, wrap
from apr_core.model.trace import Trace, mandatory_names

IDS = np.random.default_rng(4).integers(0, 331, 9)


@pytest.fixture(scope="module")
def model(tiny):
    """The torch forward of a tiny file."""
    return load_model(tiny)


def test_a_hook_that_changes_nothing_changes_no_bit(model):
    """Otherwise every planted fault would be blamed on the seam; edits in place count as nothing."""

    def scribble(name, values, at):
        values += 1

    wrapped, trace = wrap(model, scribble), Trace()

    assert np.array_equal(wrapped.forward(IDS, trace=trace), model.forward(IDS))
    assert tuple(trace) == mandatory_names(model.config.num_hidden_layers)


def test_a_hook_sees_every_name_in_order_and_where_it_is(model):
    """Ids first; start, cache and trace as the caller chose them."""
    seen = []
    wrapped = wrap(model, lambda name, values, at: seen.append((name, values.shape, at)))
    cache = wrapped.new_cache()
    wrapped.forward(IDS, cache)
    wrapped.forward(IDS[:1], cache, Trace())
    wrapped.forward(IDS)
    names = ("ids", *mandatory_names(model.config.num_hidden_layers))

    assert [name for name, _, _ in seen] == [*names * 3]
    assert [at for name, _, at in seen if name == "ids"] == [
        At(0, True, False),
        At(IDS.size, True, True),
        At(0, False, False),
    ]
    assert seen[0][1] == (IDS.size, 1)
    assert seen[-1][1] == (IDS.size, model.config.vocab_size)


def test_the_forward_goes_on_with_what_the_hook_returns(model):
    """Zeroed values of all layers leave no trace of other positions: a cached step equals one without a past."""
    wrapped = wrap(model, lambda name, values, at: 0 * values if name.endswith(".v") else None)
    cache, trace = wrapped.new_cache(), Trace()
    wrapped.forward(IDS[:5], cache)

    assert np.allclose(wrapped.forward(IDS[5:6], cache, trace), wrapped.forward(IDS[5:6]), atol=1e-5)
    assert not trace["layers.0.v"].any()
    assert not np.allclose(model.forward(IDS), wrapped.forward(IDS), atol=1e-5)


def test_planted_keys_and_values_stay_in_the_cache(model):
    """A fault of the prefill alone must be felt by the steps behind it."""
    wrapped = wrap(model, lambda name, values, at: 0 * values if name.endswith(".v") and not at.start else None)
    right, wrong = model.new_cache(), wrapped.new_cache()
    model.forward(IDS[:5], right)
    wrapped.forward(IDS[:5], wrong)

    assert not np.allclose(model.forward(IDS[5:6], right), wrapped.forward(IDS[5:6], wrong), atol=1e-5)


def test_other_ids_are_computed(model):
    """A hook on the ids feeds another token."""
    wrapped = wrap(model, lambda name, values, at: 0 * values if name == "ids" else None)

    assert np.array_equal(wrapped.forward(IDS), model.forward(0 * IDS))


def test_the_rest_is_the_wrapped_model(model):
    """Configuration, device and tokenizer pass through; the backend says that it is not what it was."""
    wrapped = wrap(model, lambda name, values, at: None)

    assert (wrapped.config, wrapped.device, wrapped.tokenizer) == (model.config, model.device, model.tokenizer)
    assert wrapped.backend == "torch with a hook"
