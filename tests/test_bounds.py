import keras
import numpy as np
import pytest
import scipy.stats
from keras import layers

from tests.conftest import net
from tvkeras import bounds, norms
from tvkeras.bounds import ABSTAIN, Smoothed
from tvkeras.evaluation import certified
from tvkeras.inference import CompiledClassifier

ALPHA = 0.001


def linear(scale=1.0):
    """A two-class linear classifier of 4x4 images in [0, `scale`], and w in units of [0, 1]."""
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), layers.Rescaling(1 / scale), layers.Flatten(), layers.Dense(2)]
    )
    weights = np.random.default_rng(0).normal(size=(16, 2)).astype("float32")
    model.set_weights([weights, np.array([0.2, 0.0], "float32") - 0.5 * weights.sum(axis=0)])
    return model, weights[:, 1] - weights[:, 0]


def at(distances):
    """Images at signed l2 distances from the boundary of `linear`, positive in class 1."""
    _, w = linear()
    length = np.linalg.norm(w)
    away = np.asarray(distances, "float32")[:, None] + 0.2 / length
    return (0.5 + away * (w / length).astype("float32")).reshape(-1, 4, 4, 1)


def uneven():
    """A classifier of 4 classes and five images on which noise makes it disagree with itself."""
    model = net(dtype="float32")
    images = np.random.default_rng(0).random((5, 6, 6, 2)).astype("float32")
    model.layers[-1].bias.assign(-model.predict(images, verbose=0).mean(axis=0))
    return CompiledClassifier(model), images


@pytest.mark.parametrize("norm", sorted(norms.DUALS))
def test_the_estimate_is_the_loss_gap_over_the_largest_gradient(norm):
    model, w = linear()
    images = np.full((5, 4, 4, 1), 0.5, "float32")
    images[3:] += 0.1 * np.sign(w).reshape(4, 4, 1)
    labels = np.array([0, 0, 1, 0, 1])
    bound = bounds.estimated_bound(model, images, labels, norm=norm, batch_size=2)
    logits = model.predict(images, verbose=0).astype(float)
    wrong = 1 / (1 + np.exp(logits[range(5), labels] - logits[range(5), 1 - labels]))
    size = {"l1": np.abs(w).max(), "l2": np.linalg.norm(w), "linf": np.abs(w).sum()}[norm]
    expected = np.maximum(np.log(2) + np.log1p(-wrong), 0) / (wrong.max() * size)
    np.testing.assert_allclose(bound.radius, expected, rtol=1e-4, atol=1e-7)
    assert bound.radius[2] == bound.radius[3] == 0
    np.testing.assert_array_equal(bound.classes, logits.argmax(axis=1))
    assert (bound.kind, bound.norm) == ("estimated", norm)
    assert "seen on 5 images" in bound.assumptions


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_a_linear_classifier_is_certified_to_just_below_its_distance(scale):
    classifier, _ = linear(scale)
    model = CompiledClassifier(classifier, bounds=(0, scale))
    distances = np.array([-0.4, -0.2, 0.0, 0.1, 0.3])
    smoothed = Smoothed(model, 0.25)
    bound = smoothed.certify(scale * at(distances), samples=10_000, alpha=ALPHA)
    assert bound.classes.tolist() == [0, 0, ABSTAIN, 1, 1]
    np.testing.assert_array_equal(bound.abstained, distances == 0)
    assert bound.radius[2] == 0
    # the smoothed classifier is the same one, and sigma Phi^-1 of the true probability its distance
    sure = bound.radius[~bound.abstained]
    assert np.all(sure <= np.abs(distances[distances != 0]))
    assert np.all(sure >= 0.85 * np.abs(distances[distances != 0]))
    assert (bound.kind, bound.norm, bound.confidence) == ("probabilistic", "l2", 1 - ALPHA)
    np.testing.assert_array_equal(smoothed.predict(scale * at(distances)), bound.classes)


def test_it_is_wrong_or_answers_on_the_boundary_as_rarely_as_it_says():
    smoothed = Smoothed(linear()[0], 0.25)
    alpha, near, on = 0.1, at(np.full(100, 0.05)), at(np.zeros(100))
    most = scipy.stats.binom.ppf(0.9999, 100, alpha)
    assert 0 < np.sum(smoothed.certify(near, samples=100, alpha=alpha).radius > 0.05) <= most
    assert 0 < np.sum(~smoothed.certify(on, samples=100, alpha=alpha).abstained) <= most
    assert 0 < np.sum(smoothed.predict(on, samples=100, alpha=alpha) != ABSTAIN) <= most


@pytest.mark.parametrize("make", [uneven, lambda: (linear()[0], at([-0.3, -0.02, 0.0, 0.1, 0.4]))])
def test_radii_and_answers_are_the_published_formulas_of_the_votes(make):
    model, images = make()
    bound = Smoothed(model, 0.5).certify(images, samples=300, alpha=0.01)
    assert np.all(bound.votes.sum(axis=1) == 300)
    assert np.all(bound.selection_votes.sum(axis=1) == 100)
    for index, (chosen, votes) in enumerate(zip(bound.selection_votes, bound.votes, strict=True)):
        hits = votes[chosen.argmax()]
        low = scipy.stats.beta.ppf(0.01, hits, 300 - hits + 1)  # proportion_confint, "beta"
        expected = (chosen.argmax(), 0.5 * scipy.stats.norm.ppf(low)) if low >= 0.5 else (-1, 0.0)
        assert (bound.classes[index], bound.radius[index]) == pytest.approx(expected, abs=1e-6)
    for alpha in (0.001, 0.05, 0.5):
        answers = Smoothed(model, 0.5).predict(images, samples=100, alpha=alpha)
        for answer, votes in zip(answers, bound.selection_votes, strict=True):  # of these copies
            second, first = np.sort(votes)[-2:]
            sure = scipy.stats.binomtest(first, first + second, 0.5).pvalue <= alpha
            assert answer == (votes.argmax() if sure else ABSTAIN)


def test_where_all_copies_agree_the_radius_is_what_their_number_allows():
    bound = Smoothed(linear()[0], 1e-3).certify(at([0.3]), samples=100, alpha=0.01)
    assert bound.radius[0] == pytest.approx(1e-3 * 1.6953, rel=1e-4)  # Phi^-1(0.01^(1/100))


def test_the_votes_are_a_function_of_seed_and_place_alone():
    model, images = uneven()

    def votes(images=images, seed=0, batch_size=500, samples=200):
        smoothed = Smoothed(model, 1.0, seed=seed, batch_size=batch_size)
        return smoothed.certify(images, samples=samples).votes

    for batch_size in (13, 1000):
        np.testing.assert_array_equal(votes(batch_size=batch_size), votes())
    others = np.concatenate([1 - images[:2], images[2:3]])
    np.testing.assert_array_equal(votes(others)[2], votes()[2])
    assert np.all(votes(samples=300) >= votes())  # more copies leave those there were
    assert np.any(votes(seed=1) != votes())
    twice = votes(np.repeat(images[:1], 2, axis=0))
    assert np.any(twice[0] != twice[1])


def test_more_samples_and_a_larger_alpha_claim_more():
    model, _ = linear()
    images, smoothed = at([-0.4, 0.2, 0.4]), Smoothed(model, 0.25)
    radii = [smoothed.certify(images, samples=n).radius for n in (100, 1000, 10_000)]
    assert np.all(np.diff([radius.mean() for radius in radii]) > 0)
    radii = [smoothed.certify(images, samples=500, alpha=a).radius for a in (1e-6, 1e-3, 0.1)]
    assert np.all(np.diff(radii, axis=0) > 0)


def test_an_interrupted_certification_goes_on(tmp_path, capsys):
    model, images = uneven()
    settings = {"samples": 200, "alpha": 0.01}
    whole = Smoothed(model, 1.0).certify(images, **settings, resume_dir=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5
    files[3].unlink()
    times = [file.stat().st_mtime_ns for file in files[:3]]
    again = Smoothed(model, 1.0, batch_size=64)
    found = again.certify(images, **settings, progress=True, resume_dir=tmp_path)
    np.testing.assert_array_equal(found.votes, whole.votes)
    np.testing.assert_array_equal(found.radius, whole.radius)
    assert [file.stat().st_mtime_ns for file in files[:3]] == times
    assert "1 images, 300 noisy copies each: about" in capsys.readouterr().out

    stricter = again.certify(images, samples=200, alpha=1e-5, resume_dir=tmp_path)
    np.testing.assert_array_equal(stricter.votes, whole.votes)
    assert np.all(stricter.radius <= whole.radius)
    for smoothed in (Smoothed(model, 1.1), Smoothed(model, 1.0, seed=1)):
        with pytest.raises(ValueError, match=r"resume_dir .* holds another call's"):
            smoothed.certify(images, **settings, resume_dir=tmp_path)
    model.classifier.set_weights([1.1 * w for w in model.classifier.get_weights()])
    with pytest.raises(ValueError, match=r"resume_dir .* holds another call's"):
        again.certify(images, **settings, resume_dir=tmp_path)


def test_the_cost_is_in_proportion_to_the_work():
    model, images = uneven()
    smoothed = Smoothed(model, 1.0, batch_size=100)
    assert 0 < smoothed.cost(images, 1000) < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 0.0}, "sigma must be a number > 0 and <= 10, got sigma=0.0"),
        ({"sigma": 64}, "sigma must be a number > 0 and <= 10, got sigma=64"),
        ({"sigma": "0.25"}, r"sigma must be .*Remove the quotation marks"),
        ({"samples": 0}, r"samples must be 10 to 2000000 for alpha=0\.001"),
        ({"samples": 9}, r"samples must be 10 .*got samples=9\. With fewer it would abstain"),
        ({"samples": 1e4}, "samples must be a whole number"),
        ({"samples": 2_000_000}, "samples must be 10 to 2000000"),
        ({"selection_samples": 0}, "selection_samples must be a whole number >= 1"),
        ({"alpha": 0.0}, r"alpha must be a number > 0 and <= 0\.5, got alpha=0\.0"),
        ({"alpha": 1.0}, r"alpha must be a number > 0 and <= 0\.5, got alpha=1\.0"),
        ({"seed": -1}, "seed must be a whole number >= 0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    own = {"sigma": 0.25} | {
        name: arguments[name] for name in ("sigma", "seed", "batch_size") if name in arguments
    }
    asked = {name: value for name, value in arguments.items() if name not in own}
    with pytest.raises(ValueError, match=message):
        Smoothed(linear()[0], **own).certify(at([0.1]), **asked)


def test_a_vote_needs_one_more_sample_than_a_bound_to_be_sure():
    smoothed = Smoothed(linear()[0], 1e-3)
    assert smoothed.certify(at([0.1]), samples=10).classes == 1
    with pytest.raises(ValueError, match="samples must be 11 to"):
        smoothed.predict(at([0.1]), samples=10)
    assert smoothed.predict(at([0.1]), samples=11) == 1


def test_certified_accuracy_is_the_share_that_is_right_and_far_enough(tmp_path):
    distances = np.array([-0.3, 0.3, 0.2, 0.0, 0.1, 0.15])
    bound = Smoothed(linear()[0], 0.25).certify(at(distances))
    labels = np.array([0, 1, 0, 1, 1, 1])  # the third one is wrong, at the fourth it abstains
    rates = certified.certified_accuracy(bound, labels, (0.0, "8/255", 0.12, 0.4))
    values = {radius: (round(6 * rate.value), rate.n) for radius, rate in rates.items()}
    assert values == {"0.0": (4, 6), "8/255": (4, 6), "0.12": (3, 6), "0.4": (0, 6)}
    assert rates["0.4"].low == 0 < rates["0.4"].high
    with pytest.raises(ValueError, match=r"labels must .* got 6 images"):
        certified.certified_accuracy(bound, labels[1:], (0.1,))

    attacked = {"attacked, without noise": np.array([0.0, 0.2, np.inf])}
    certified.accuracy_curves(bound, labels, attacked, tmp_path / "certified.png")
    certified.accuracy_curves(bound, labels, {}, tmp_path / "alone.png")
    for name in ("certified.png", "alone.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
