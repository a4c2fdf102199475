"""Wrong types, shapes, names and orders of arguments from Python.

Each case raises an error of this package, one sentence in one line, before a long computation begins.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import hiso_jax
from hiso_jax import algorithms, channels, fed, models, tasks, tune, zo
from tests.fed.problems import digits_population, linear_task

TX = hiso_jax.decomfl(0.1)
CONFIG = fed.SimulationConfig(rounds=2, cohort=2, eval_every=2)
X, Y = np.zeros((6, 4), np.float32), np.array([0, 1, 2, 0, 1, 2])
TABLE = pd.DataFrame(X, columns=list("abcd")).assign(label=Y)
PARAMS, BATCH, KEY = {"w": jnp.ones(3)}, jnp.zeros(3), jax.random.key(0)


def sim(**given):
    parts = {"task": linear_task(), "tx": TX, "population": digits_population(), "config": CONFIG, **given}
    return fed.Simulation(**parts)


def init(key):
    return {"w": jnp.zeros((4, 3))}


def classify(train=None, test=None, apply=lambda params, x: x @ params["w"]):
    data = {"input": X, "label": Y}
    return tasks.Classification(init, apply, data if train is None else train, data if test is None else test)


def loss(params, batch):
    return jnp.sum((params["w"] - batch) ** 2)


def step(params=PARAMS, state=None, batch=BATCH, key=KEY, loss_fn=loss, tx=TX, **options):
    return zo.step(loss_fn, tx, **options)(params, TX.init(PARAMS) if state is None else state, batch, key)


def result():
    return sim().run()


def fleet(**changes):
    numbers = {name: fed.LogNormal(1.0, 0.0) for name in ("forward_seconds", "downlink", "uplink")}
    return fed.Participation(fleet=fed.Fleet(**{**numbers, **changes}))


CASES = {
    # Simulation
    "a name as task": (lambda: sim(task="digits"), "task must be a task, .* hiso_jax.Experiment takes names"),
    "a factory as task": (lambda: sim(task=tasks.digits), r"task must be a task, .* digits\(…\) with parentheses"),
    "a class as task": (lambda: sim(task=tasks.Classification), r"task must be .* Classification\(…\) with parenth"),
    "tests of another shape": (
        lambda: sim(task=classify(test={"input": X[:, :3], "label": Y})),
        r"test\['input'\] must have examples of the shape of train\['input'\]",
    ),
    "a name as tx": (lambda: sim(tx="hiso"), "tx must be an optax transformation or a fed.Algorithm, .* got a str"),
    "a factory as tx": (lambda: sim(tx=algorithms.mosaic), r"tx must be .* got a function: mosaic\(0.01\), say"),
    "an optimizer without a head": (lambda: sim(tx=optax.sgd(0.1)), "exactly one of scale_by_hiso or scale_by_zo"),
    "adam": (lambda: sim(tx=optax.adam(0.1)), "exactly one of scale_by_hiso or scale_by_zo"),
    "adam in an algorithm": (lambda: sim(tx=fed.Algorithm(optax.adam(0.1))), "exactly one of scale_by_hiso"),
    "momentum before the head": (lambda: sim(tx=optax.chain(optax.trace(0.9), TX)).run(), "stands before scale_by"),
    "a list as population": (lambda: sim(population=[[0, 1], [2]]), "population must be a population, .* got a list"),
    "a number as population": (lambda: sim(population=6), "population must be a population, .* got an int"),
    "population and task swapped": (lambda: sim(task=digits_population(), population=linear_task()), "population must"),
    "a dict as config": (lambda: sim(config={"rounds": 2}), "config must be a fed.SimulationConfig, got a dict"),
    "the class as config": (lambda: sim(config=fed.SimulationConfig), "got the class SimulationConfig: .* parentheses"),
    "a number as mesh": (lambda: sim(mesh=1), r"mesh must be a mesh, like fed.make_mesh\(\), got an int"),
    "a number as storage": (lambda: sim(storage=5), "storage must be a path or a fed.Storage, got an int"),
    "a flag as storage": (lambda: sim(storage=True), "storage must be a path or a fed.Storage, got a bool"),
    "no folder as storage": (lambda: sim(storage=""), "directory must be a path, got ''"),
    "a word for resume": (lambda: fed.Storage("x", resume="no"), "resume must be True or False, got a str"),
    "text about a run": (lambda: fed.Storage("x", about="mine"), "about must be a dict of JSON values, got a str"),
    "a number as participation": (lambda: sim(participation=0.5), "participation must be a fed.Participation"),
    "a callback of one argument": (lambda: sim(callbacks=lambda session: 0), r"callbacks must be a function of \(ses"),
    "a number in a callback": (lambda: fed.Callback(5), r"function must be a function of \(session, evaluation\)"),
    "a cohort above the clients": (lambda: sim(config=dataclasses.replace(CONFIG, cohort=99)), "cohort must be at most"),
    # Configuration
    "a misspelt number": (
        lambda: fed.SimulationConfig(round=10),
        "round is no parameter of SimulationConfig; did you mean `rounds`",
    ),
    "a model without a key": (
        lambda: tasks.Classification(lambda: 0, lambda w, x: x, {"input": X, "label": Y}, {"input": X, "label": Y}),
        "model_init must make parameters from a key; it fails: .* takes 0 positional arguments",
    ),
    "no rounds": (lambda: fed.SimulationConfig(rounds=0), "rounds must be at least 1, got 0"),
    "half a round": (lambda: fed.SimulationConfig(rounds=2.5), "rounds must be an integer, got 2.5"),
    "text as rounds": (lambda: fed.SimulationConfig(rounds="10"), "rounds must be an integer, got '10'"),
    "a key as seed": (lambda: fed.SimulationConfig(seed=KEY), "seed must be an integer, got a .*Array"),
    "no cohort": (lambda: fed.SimulationConfig(cohort=0), "cohort must be at least 1"),
    "never evaluated": (lambda: fed.SimulationConfig(eval_every=0), "eval_every must be at least 1"),
    "no perturbations": (lambda: fed.SimulationConfig(perturbations=0), "perturbations must be at least 1"),
    "a negative mu": (lambda: fed.SimulationConfig(mu=-1.0), "mu must be a positive finite number"),
    "several mu": (lambda: fed.SimulationConfig(mu=np.ones(2)), "mu must be a positive finite number"),
    "another difference": (lambda: fed.SimulationConfig(difference="backward"), "difference must be forward or central"),
    "a word as flag": (lambda: fed.SimulationConfig(public_cohorts="no"), "public_cohorts must be True or False"),
    # Methods
    "a negative rate": (lambda: hiso_jax.hiso(-0.1), "must be a finite number ≥ 0 or a schedule"),
    "a negative rate of JAX": (lambda: hiso_jax.hiso(jnp.float32(-0.1)), "must be a finite number ≥ 0 or a schedule"),
    "parameters as rate": (lambda: hiso_jax.hiso({"w": jnp.ones(300)}), "must be .* schedule over rounds, got a dict$"),
    "a schedule without a round": (lambda: algorithms.mosaic(lambda: 0.1), r"must be a function of \(round\)"),
    "a number as sampler": (lambda: hiso_jax.hiso(0.1, sampler=3), r"sampler must be a function of \(key, shape, dty"),
    "a class as sampler": (lambda: hiso_jax.hiso(0.1, sampler=zo.LowRank), "sampler must be .* the class LowRank"),
    "a misspelt sampler": (lambda: hiso_jax.hiso(0.1, sampler="gausian"), "sampler must be one of .* got 'gausian'"),
    "a sampler of its own shape": (
        lambda: sim(tx=hiso_jax.decomfl(0.1, sampler=lambda key, shape, dtype: jnp.ones(2))).run(),
        "sampler must return an array of the shape",
    ),
    "no perturbations of a method": (lambda: fed.Algorithm(TX, perturbations=0), "perturbations must be at least 1"),
    "a difference as measure": (lambda: fed.Algorithm(TX, measure=zo.central), "measure must be a measure, like"),
    "a function as combiner": (lambda: fed.Algorithm(TX, combine=np.mean), r"combine must be of fed.Combine"),
    "a combiner's factory": (lambda: fed.Algorithm(TX, combine=channels.median), r"combine must be of fed.Combine"),
    # Populations and participation
    "labels and clients swapped": (lambda: fed.dirichlet(6, Y, alpha=0.5), "labels must be one value for each example"),
    "no labels": (lambda: fed.dirichlet(None, 3, alpha=0.5), "labels must be one value for each example, got None"),
    "ragged labels": (lambda: fed.dirichlet([[0, 1], [2]], 2, alpha=0.5), "labels must be one value for each example"),
    "no alpha": (lambda: fed.dirichlet(Y, 3, alpha=0.0), "alpha must be a positive finite number"),
    "more clients than examples": (lambda: fed.iid(6, 60), "clients must be at most the number of training examples"),
    "labels in iid": (lambda: fed.iid(Y, 3), "examples must be an integer"),
    "a negative seed": (lambda: fed.iid(6, 3, seed=-1), "seed must be at least 0, got -1"),
    "text as seed": (lambda: fed.dirichlet(Y, 3, alpha=0.5, seed="a"), "seed must be an integer, got 'a'"),
    "a column with gaps": (lambda: fed.by_column(pd.Series(["a", None])), "owners must be one value for each example"),
    "a rate of nothing": (lambda: sim(participation=fed.Participation(fed.Bernoulli(None))), "rate must be a number"),
    "rates as a rate": (lambda: sim(participation=fed.Participation(fed.Bernoulli([0.5]))), "rate must be a number"),
    "one rate for all": (lambda: sim(participation=fed.Participation(fed.ClientRates(0.5))), "rates must be one number f"),
    "a file as trace": (lambda: sim(participation=fed.Participation(fed.Trace("t.csv"))), "table must .* fed.load_trace"),
    "a number as speed": (lambda: sim(participation=fleet(uplink=5.0)), "uplink must be a fed.LogNormal"),
    "no speed": (lambda: sim(participation=fleet(uplink=fed.LogNormal(None, 0.0))), "median must be a number"),
    "a class as fleet": (lambda: sim(participation=fed.Participation(fleet=fed.Fleet)), "fleet must be a fed.Fleet, got the"),
    "no devices": (lambda: fed.make_mesh([]), "devices must be at least one device, got none"),
    # Tasks
    "text as labels": (lambda: classify({"input": X, "label": list("abcabc")}), "names, numbers = numpy.unique"),
    "one-hot labels": (lambda: classify({"input": X, "label": np.eye(3)[Y]}), r"labels.argmax\(1\) makes numbers"),
    "labels in a column": (lambda: classify({"input": X, "label": Y[:, None]}), r"labels\[:, 0\] has one for each"),
    "a label missing": (lambda: classify({"input": X, "label": [0, 1, np.nan, 0, 1, 2]}), "example 2 has no label"),
    "text as inputs": (lambda: classify({"input": X.astype(str), "label": Y}), r'train\["input"\] must hold numbers'),
    "no parameters": (
        lambda: sim(task=dataclasses.replace(linear_task(), model_init=lambda key: {}, model_apply=lambda p, x: x[:, 0, :, 0] @ jnp.ones((8, 10)))),
        "init must make at least one parameter",
    ),
    "labels without an example": (lambda: classify({"input": X, "label": Y[:3]}), "as many inputs as labels"),
    "a class too many": (lambda: classify({"input": X, "label": Y + 1}), "must be at least 0 and below 3"),
    "an entry of another name": (lambda: classify({"x": X, "label": Y, "y": Y}), r"\['x'\] must be one number"),
    "columns in another order": (
        lambda: classify(TABLE, TABLE[["b", "a", "c", "d", "label"]]),
        r"test must have the columns of train in their order, \['a'",
    ),
    "another number of features": (lambda: classify(TABLE.drop(columns="a")), "model_apply must take the task's inputs"),
    "one number as logits": (lambda: classify(apply=lambda params, x: x.sum()), "model_apply must give logits of shape"),
    "functions among parameters": (lambda: TX.init({"w": jnp.ones(3), "act": jax.nn.relu}), "params must be a tree of arrays"),
    "integers among parameters": (lambda: TX.init({"w": jnp.ones(3, int)}), "must be floating point"),
    "a model in the place of the trained": (
        lambda: tasks.text.text_task("sst2", "opt", "opt"), "model must be the result of models.lm.tune"
    ),
    "a dtype that is none": (lambda: models.lm.load("m", dtype="float12"), "dtype must be a floating-point dtype"),
    # zo.step
    "a loss that is no function": (lambda: step(loss_fn=0.5), r"loss_fn must be a function of \(params, batch\)"),
    "a loss for each example": (lambda: step(loss_fn=lambda p, b: p["w"]), "loss_fn must return one number"),
    "a loss with more": (lambda: step(loss_fn=lambda p, b: (loss(p, b), 0)), "loss_fn must return the loss alone"),
    "a count as loss": (lambda: step(loss_fn=lambda p, b: (p["w"] > 0).sum()), "loss_fn must return a floating-point"),
    "a seed as key": (lambda: step(key=0), r"round_key must be one key, jax.random.key\(seed\) say; got 0"),
    "several keys": (lambda: step(key=jax.random.split(KEY, 3)), "round_key must be one key"),
    "params and state swapped": (lambda: step(params=TX.init(PARAMS), state=PARAMS), "(params|state) must be"),
    "state of another optimizer": (lambda: step(state=optax.adam(0.1).init(PARAMS)), "state must be tx.init"),
    "half a perturbation": (lambda: step(num_perturbations=2.5), "num_perturbations must be an integer"),
    # Files and replay
    "records and optimizer swapped": (lambda: hiso_jax.replay(PARAMS, "records", TX), "records must be the"),
    "no records": (lambda: hiso_jax.replay(PARAMS, TX, None), "records must be of a run with at least one round"),
    "a result as records": (lambda: hiso_jax.replay(PARAMS, TX, result()), "records must be the `records` of a result"),
    "a result as parameters": (lambda: hiso_jax.replay(result(), TX, result().records), "params must .* initial_params"),
    "a result as ledger": (lambda: fed.delta_of(result()), r"ledger must be a ledger, as fed.load"),
    "a path as delta": (lambda: fed.apply_delta("d.safetensors", PARAMS, TX), r"delta must be a delta, as fed.load_delta"),
    "delta and path swapped": (lambda: fed.save_delta("d.safetensors", None), r"delta must be a delta, as fed.delta_of"),
    "no path of a delta": (lambda: fed.load_delta(None), "path must be a path, got None"),
    "no path of a ledger": (lambda: fed.load(None), "path must be a path, got None"),
    "a population as a number": (lambda: fed.client_metrics(linear_task(), PARAMS, 6), "population must be a population"),
    # Experiment and studies
    "a misspelt option": (lambda: hiso_jax.Experiment(round=2), "round .*did you mean `?rounds"),
    "a misspelt method": (lambda: hiso_jax.Experiment(algorithm="hizo"), "algorithm must be one of .* did you mean hizoo"),
    "a method's factory": (lambda: hiso_jax.Experiment(algorithm=algorithms.mosaic), r"algorithm must be .*mosaic\(0.01\)"),
    "a task's factory": (lambda: hiso_jax.Experiment(task=tasks.digits), r"task must be a task, .* digits\(…\) with"),
    "storage of an experiment": (lambda: hiso_jax.Experiment(storage="x"), "storage is no option .* directory to .run"),
    "callbacks of an experiment": (lambda: hiso_jax.Experiment(callbacks=[]), r"callbacks .* an argument of .run\(\)"),
    "a word as option": (lambda: hiso_jax.Experiment(guard="no"), "guard must be True or False, got a str"),
    "a task without a tuned rate": (lambda: hiso_jax.Experiment(task=linear_task()), "learning_rate must be given, .*linear$"),
    "an accuracy of ninety": (lambda: hiso_jax.Experiment(target=90), "target must be at most 1 for accuracy, .* 0.9"),
    "no methods": (lambda: tune.compare(None), "algorithms must be names of methods, got None"),
    "no rates": (lambda: tune.sweep(["decomfl"], learning_rate=[]), "learning_rate must have at least one entry"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_one_sentence(name):
    wrong, sentence = CASES[name]
    with pytest.raises((ValueError, TypeError), match=sentence) as found:
        wrong()
    # JAX appends a note to errors that are raised while it traces.
    text = str(found.value).partition("\n-----")[0]
    assert "\n" not in text
    assert len(text) < 700
    # Raised here, and not deep in a library.
    assert "hiso_jax" in str(found.traceback[-1].path)
