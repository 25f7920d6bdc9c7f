"""Every fact about the objective that DESIGN states, in float64 on small networks."""

import dataclasses
import itertools
import math

import keras
import numpy as np
import pytest

import tvkeras
from tests.conftest import arrays, assert_close, batch, distance, net, update
from tvkeras import backends, norms
from tvkeras.defenses import TRADES, AdversarialTraining, Defense, TVLipschitz, Undefended

NORMS = sorted(norms.DUALS)
ENTRIES = 6 * 6 * 2


def naive(classifier, images, labels, norm, tv_weight, lipschitz_weight, fd_step, scheme):
    """The objective written down directly, all passes in one differentiated function."""
    images = keras.ops.convert_to_tensor(images)
    state = [v.value for v in classifier.non_trainable_variables]

    def losses(trainable, x):
        logits, _ = classifier.stateless_call(trainable, state, x, training=True)
        return keras.ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)

    trainable = [v.value for v in classifier.trainable_variables]
    _, (g,) = backends.value_and_gradient(
        lambda x: (keras.ops.sum(losses(trainable, x)), None), (images,)
    )
    d = norms.steepest_direction(g, norm)
    largest = int(np.argmax(keras.ops.convert_to_numpy(norms.dual_length(g, norm))))
    step = fd_step / (math.sqrt(ENTRIES) if norm == "linf" else 1)

    def objective(trainable):
        clean = losses(trainable, images)
        ahead = losses(trainable, images + step * d)
        if scheme == "central":
            quotient = (ahead - losses(trainable, images - step * d)) / (2 * step)
        else:
            quotient = (ahead - clean) / step
        penalty = (
            tv_weight * keras.ops.sum(quotient) / len(labels) + lipschitz_weight * quotient[largest]
        )
        return keras.ops.sum(clean) / len(labels) + penalty, None

    (value, _), (gradients,) = backends.value_and_gradient(objective, (trainable,))
    return value, gradients


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("lipschitz_weight", [0.0, 0.3])
def test_the_passes_combine_to_the_gradient_of_the_objective(norm, scheme, lipschitz_weight):
    classifier, (images, labels) = net(activation="relu"), batch()
    settings = {"norm": norm, "tv_weight": 0.2, "lipschitz_weight": lipschitz_weight}
    settings |= {"fd_step": 0.05, "scheme": scheme}
    value, gradients = naive(classifier, images, labels, **settings)
    result = update(TVLipschitz(**settings), classifier, images, labels)
    assert_close([result.loss], [value])
    assert_close(result.gradients, gradients)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_step_of_tv_weight_is_one_step_adversarial_training(norm, batch_norm):
    classifier, (images, labels) = net(batch_norm=batch_norm), batch()
    epsilon = 0.07
    fd_step = epsilon * (math.sqrt(ENTRIES) if norm == "linf" else 1)
    tv = TVLipschitz(norm=norm, tv_weight=epsilon, fd_step=fd_step)
    attack = AdversarialTraining(
        norm=norm, epsilon=epsilon, steps=1, random_start=False, bounds=None
    )
    one, other = (update(defense, classifier, images, labels) for defense in (tv, attack))
    rtol = 1e-5 if batch_norm else 1e-9  # Keras takes the batch statistics in float32
    assert_close(one.gradients, other.gradients, rtol)
    assert_close([one.loss], [other.loss], rtol)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["finite_difference", "double_backprop"])
def test_a_zero_gradient_gives_no_nan(norm, method):
    classifier, (images, labels) = net(), batch()
    for variable in classifier.trainable_variables:
        variable.assign(np.zeros(variable.shape))
    defense = TVLipschitz(norm=norm, lipschitz_weight=1.0, method=method)
    result = update(defense, classifier, images, labels)
    assert all(np.isfinite(array).all() for array in arrays(result.gradients))
    assert float(result.penalties["total_variation"]) == 0
    assert float(result.penalties["lipschitz"]) == 0


@keras.saving.register_keras_serializable("tests")
class FirstLogit(keras.losses.Loss):
    """A loss linear in the logits."""

    def call(self, y_true, y_pred):
        return y_pred[:, 0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_the_quotient_is_exact_on_a_loss_linear_in_the_image(norm, scheme):
    classifier, (images, labels) = net(activation="linear"), batch()
    settings = {"norm": norm, "tv_weight": 0.3, "lipschitz_weight": 0.2}
    far = TVLipschitz(**settings, fd_step=3.0, scheme=scheme)
    exact = TVLipschitz(**settings, method="double_backprop")
    one, other = (update(d, classifier, images, labels, loss=FirstLogit()) for d in (far, exact))
    assert_close([one.loss], [other.loss])
    assert_close(one.gradients, other.gradients)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("central", 2)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_finite_differences_converge_to_double_backprop(norm, scheme, order, dropout):
    """With dropout this also shows that both ends of the quotient see the same masks."""
    classifier, (images, labels) = net(dropout=dropout), batch()
    settings = {"norm": norm, "tv_weight": 0.5, "lipschitz_weight": 0.3}
    exact = update(TVLipschitz(**settings, method="double_backprop"), classifier, images, labels)
    errors = [
        distance(
            update(
                TVLipschitz(**settings, fd_step=step, scheme=scheme), classifier, images, labels
            ).gradients,
            exact.gradients,
        )
        for step in (1e-1, 1e-2)
    ]
    assert errors[1] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(10**order, rel=0.5)


def test_under_batch_norm_the_appended_row_disturbs_the_mean_by_little():
    """It joins the second pass's statistics: O(1 / batch size) over the step."""
    classifier, (images, labels) = net(batch_norm=True), batch(64)
    plain = arrays(update(Undefended(), classifier, images, labels).gradients)
    penalties = []
    for lipschitz_weight in (0.0, 1e-9):  # the smallest weight appends the row all the same
        defense = TVLipschitz(fd_step=0.1, lipschitz_weight=lipschitz_weight)
        gradients = arrays(update(defense, classifier, images, labels).gradients)
        penalties.append([one - other for one, other in zip(gradients, plain, strict=True)])
    assert 0 < distance(penalties[1], penalties[0]) < 0.1


@pytest.mark.parametrize("defense", [TVLipschitz(lipschitz_weight=0.1), TRADES(steps=2)])
def test_moving_statistics_are_those_of_the_clean_pass(defense):
    classifier, (images, labels) = net(batch_norm=True), batch()
    plain = update(Undefended(), classifier, images, labels)
    assert_close(update(defense, classifier, images, labels).state, plain.state, rtol=0)


@pytest.mark.parametrize(
    "defense",
    [
        TVLipschitz(lipschitz_weight=0.1),
        TVLipschitz(scheme="central"),
        TVLipschitz(method="double_backprop"),
        TVLipschitz(penalty_fraction=0.5),
        AdversarialTraining(steps=2),
        TRADES(steps=2),
    ],
    ids=str,
)
def test_weight_regularisation_counts_once(defense):
    images, labels = batch()
    plain, regularized = net(), net(regularizer=keras.regularizers.L2(0.5))
    regularized.set_weights(plain.get_weights())
    expected = arrays(update(defense, plain, images, labels).gradients)
    expected[0] = expected[0] + plain.get_weights()[0]
    assert_close(update(defense, regularized, images, labels).gradients, expected)


@pytest.mark.parametrize(
    "defense",
    [
        Undefended(),
        TVLipschitz(norm="l2", lipschitz_weight=0.2),
        TVLipschitz(norm="linf", lipschitz_weight=0.2, method="double_backprop"),
        AdversarialTraining(steps=2, random_start=False),
    ],
    ids=str,
)
def test_an_image_of_weight_zero_does_not_exist(defense):
    classifier, (images, labels) = net(), batch(8)
    weight = np.array([2.0] * 4 + [0.0] * 4)  # mean over 8 of these is the mean over 4
    weighted = update(defense, classifier, images, labels, weight=weight)
    if isinstance(defense, TVLipschitz):  # of the maximum they are twice that over 4
        defense = dataclasses.replace(defense, lipschitz_weight=2 * defense.lipschitz_weight)
    alone = update(defense, classifier, images[:4], labels[:4])
    assert_close(weighted.gradients, alone.gradients)
    assert_close([weighted.loss], [alone.loss])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_penalties_are_those_of_the_weighted_losses(norm, batch_norm):
    classifier, (images, labels) = net(batch_norm=batch_norm), batch(6)
    defense = TVLipschitz(norm=norm, lipschitz_weight=0.3)
    x, y = (keras.ops.convert_to_tensor(array) for array in (images, labels))
    parts = (classifier.trainable_variables, classifier.non_trainable_variables)
    variables = [[variable.value for variable in part] for part in parts]

    def sizes(weight):
        def loss(images):
            logits = classifier.stateless_call(*variables, images, training=True)[0]
            losses = keras.ops.sparse_categorical_crossentropy(y, logits, from_logits=True)
            return keras.ops.sum(losses * keras.ops.convert_to_tensor(weight)), None

        (gradient,) = backends.value_and_gradient(loss, (x,))[1]
        return arrays([norms.dual_length(gradient, norm)])[0]

    def found(weight):
        penalties = update(defense, classifier, images, labels, weight=weight).penalties
        return [float(penalties[name]) for name in ("total_variation", "lipschitz")]

    unweighted = sizes(np.ones(6))
    largest = unweighted.argmax()
    for small in (3.0, 1.0, 0.1, 1e-6, 1e-30):
        weight = np.where(np.arange(6) == largest, small, 1.0)
        expected = sizes(weight)
        rounding = 1e-6 if batch_norm else 1e-9  # under JAX, Keras's moments are float32
        assert found(weight) == pytest.approx([expected.mean(), expected.max()], rel=rounding)
        if not batch_norm:
            np.testing.assert_allclose(expected, weight * unweighted, rtol=1e-9)
    nearly, nothing = found(weight)[1], found(np.where(weight < 1, 0.0, 1.0))[1]
    assert nearly == pytest.approx(nothing, rel=1e-6)  # the maximum is another image's
    assert nearly < unweighted.max()


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_weights_of_one_change_no_bit(scheme, batch_norm):
    classifier, (images, labels) = net(batch_norm=batch_norm), batch(6)
    defense = TVLipschitz(lipschitz_weight=0.3, scheme=scheme)
    plain = update(defense, classifier, images, labels)
    weighted = update(defense, classifier, images, labels, weight=np.ones(6))
    for one, other in zip(
        arrays([*plain.gradients, plain.loss, *plain.penalties.values()]),
        arrays([*weighted.gradients, weighted.loss, *weighted.penalties.values()]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_the_weighted_quotient_converges_to_the_weighted_gradient():
    classifier, (images, labels) = net(), batch(6)
    weight = np.array([0.0, 1e-6, 0.5, 1.0, 2.0, 3.0])
    settings = {"tv_weight": 0.5, "lipschitz_weight": 0.3}
    exact = TVLipschitz(method="double_backprop", **settings)
    expected = update(exact, classifier, images, labels, weight=weight).gradients
    for scheme, error in (("forward", 1e-3), ("central", 1e-6)):
        quotient = TVLipschitz(scheme=scheme, fd_step=1e-3, **settings)
        actual = update(quotient, classifier, images, labels, weight=weight).gradients
        assert distance(actual, expected) < error


def test_the_penalty_does_not_depend_on_how_the_batch_is_split():
    classifier, (images, labels) = net(), batch(8)
    defense = TVLipschitz(lipschitz_weight=0.1)
    whole = update(defense, classifier, images, labels).penalties
    parts = [update(defense, classifier, images[i::2], labels[i::2]).penalties for i in (0, 1)]
    mean = np.mean([float(part["total_variation"]) for part in parts])
    assert float(whole["total_variation"]) == pytest.approx(mean, rel=1e-12)
    largest = max(float(part["lipschitz"]) for part in parts)
    assert float(whole["lipschitz"]) == pytest.approx(largest, rel=1e-12)


def test_a_penalty_fraction_keeps_the_expected_gradient():
    """One of four images is drawn: the mean over the four possible draws is the whole."""
    classifier, (images, labels) = net(), batch(4)
    settings = {"tv_weight": 0.5, "fd_step": 0.05}
    draws = {}
    for seed in itertools.count():
        defense = TVLipschitz(**settings, penalty_fraction=0.25)
        result = update(defense, classifier, images, labels, seed=seed)
        draws[round(float(result.penalties["total_variation"]), 9)] = arrays(result.gradients)
        if len(draws) == 4:
            break
        assert seed < 200
    mean = [np.mean(group, axis=0) for group in zip(*draws.values(), strict=True)]
    assert_close(mean, update(TVLipschitz(**settings), classifier, images, labels).gradients)


def test_a_penalty_every_second_step_is_a_doubled_one_and_a_plain_one_in_turn():
    classifier, (images, labels) = net(), batch()
    start = classifier.get_weights()
    settings = {"lipschitz_weight": 0.2, "fd_step": 0.05}

    def trained(*defenses, steps):
        classifier.set_weights(start)
        for defense in defenses:
            robust = tvkeras.RobustClassifier(classifier, defense, dtype=classifier.dtype)
            robust.compile(keras.optimizers.SGD(0.1))
            logs = robust.fit(images, labels, batch_size=8, epochs=steps, verbose=0).history
        return classifier.get_weights(), logs

    found, logs = trained(TVLipschitz(tv_weight=0.3, penalty_every=2, **settings), steps=2)
    settings["lipschitz_weight"] *= 2
    expected, _ = trained(TVLipschitz(tv_weight=0.6, **settings), Undefended(), steps=1)
    assert_close(found, expected)
    assert logs["total_variation"][0] > 0  # what the plain step does not measure is left out
    assert TVLipschitz(penalty_every=2).passes == 1.5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random_start", [False, True])
def test_the_training_attack_stays_in_the_ball_and_in_bounds(norm, random_start):
    """The last images that the classifier sees are the adversarial ones."""
    seen = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Spy(AdversarialTraining):
        def update(self, batch):
            def call(trainable, images):
                seen.append(images)
                return batch.call(trainable, images)

            return super().update(dataclasses.replace(batch, call=call))

    classifier, (images, labels) = net(dtype="float32"), batch(dtype="float32")
    spy = Spy(norm=norm, epsilon=0.2, steps=5, random_start=random_start)
    result = update(spy, classifier, images, labels)
    assert float(result.loss) > float(update(Undefended(), classifier, images, labels).loss)
    x_adv = keras.ops.convert_to_numpy(seen[-1])
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    perturbation = (x_adv - images).reshape(len(images), -1)
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    assert np.linalg.norm(perturbation, order, axis=1).max() <= 0.2 * (1 + 1e-5)


def test_trades_without_divergence_is_plain_training():
    classifier, (images, labels) = net(), batch()
    plain = update(Undefended(), classifier, images, labels)
    assert_close(
        update(TRADES(beta=0.0, steps=2), classifier, images, labels).gradients, plain.gradients
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l3"}, "norm must be one of"),
        ({"tv_weight": "1/x"}, "tv_weight must be a number or a fraction"),
        ({"tv_weight": -0.1}, "tv_weight must be a number >= 0"),
        ({"lipschitz_weight": "0.1"}, "Remove the quotation marks"),
        ({"fd_step": 0}, "fd_step must be a number > 0"),
        ({"scheme": "backward"}, "scheme must be one of"),
        ({"method": "finite_diff"}, "Did you mean 'finite_difference'"),
        ({"penalty_fraction": 1.5}, "penalty_fraction must be a number > 0 and <= 1"),
        ({"penalty_every": 2, "penalty_fraction": 0.5}, "Save by one of them"),
        ({"penalty_every": 0}, "penalty_every must be a whole number >= 1"),
        ({"penalty_fraction": 0.5, "method": "double_backprop"}, "penalty_fraction"),
    ],
)
def test_illegal_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TVLipschitz(**settings)


@pytest.mark.parametrize("kind", [AdversarialTraining, TRADES])
@pytest.mark.parametrize(
    "settings",
    [{"norm": "l0"}, {"epsilon": -1}, {"steps": 0}, {"step_size": "a"}, {"bounds": (1, 0)}],
)
def test_illegal_attacks_are_refused(kind, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)


@pytest.mark.parametrize(
    "defense",
    [Undefended(), TVLipschitz(tv_weight="8/255"), AdversarialTraining(), TRADES(bounds=None)],
    ids=str,
)
def test_a_defence_survives_serialisation(defense):
    config = keras.saving.serialize_keras_object(defense)
    assert keras.saving.deserialize_keras_object(config) == defense


def test_the_base_has_no_objective():
    with pytest.raises(TypeError, match="defines no objective"):
        update(Defense(), net(), *batch())
