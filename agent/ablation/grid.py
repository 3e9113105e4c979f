"""The arms of the ablations, as what each changes in a recipe, and the tables that set them side by side.

GenDataAgent's are here, RL-identity's in `identity`, ARGen's in `expressions`. Knows nothing of how arms are run, nor
of what came out. Arms that come to the same settings are one, such as those with and without caption perturbation of a
recipe that perturbs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agent.ablation import expressions, identity
from agent.ablation.table import BASELINE, Changes, Table
from protocol import config
from protocol.errors import ConfigError

ON_THE_FLY = "gendataagent"

GENDATAAGENT: dict[str, Table] = {
    "3": Table(
        "components",
        (
            ("only real data", BASELINE),
            ("Real-Fake (static)", "real-fake-1"),
            ("+ marginal sampling", "marginal"),
            ("+ caption perturbation", "perturbed"),
            ("+ VoG filtering", ON_THE_FLY),
        ),
    ),
    "4": Table("feedback criteria", (("entropy score", "entropy"), ("marginal score", ON_THE_FLY))),
    "5": Table(
        "VoG checkpoints",
        (("3 checkpoints", "checkpoints-3"), ("4 checkpoints", "checkpoints-4"), ("5 checkpoints", "checkpoints-5")),
    ),
    "6": Table(
        "traditional augmentation",
        (("only real data", BASELINE), ("RandAugment", "randaugment"), ("GenDataAgent", ON_THE_FLY)),
    ),
    "7": Table(
        "over seeds",
        (
            ("Real-Fake", "real-fake-1"),
            ("Internet Explorer (15-NN similarity)", "internet-explorer"),
            ("GenDataAgent", ON_THE_FLY),
        ),
        spread="standard deviation",
    ),
    # Tables 8 and 9 without perturbation: the paper's row of k = 1/5 has the accuracies of Table 3's "+ marginal
    # sampling". Its row of k = 1/2 is closer to "+ caption perturbation".
    "8": Table(
        "image strength (k = 1/5; no perturbation, no VoG)",
        (("strength 0.50", "strength-0.5"), ("strength 0.75", "strength-0.75"), ("strength 0.90", "strength-0.9")),
    ),
    "9": Table(
        "marginal samples, k (no perturbation, no VoG)",
        (
            ("0 (only real data)", BASELINE),
            ("1/5 of the training set", "k-0.2"),
            ("1/4 of the training set", "k-0.25"),
            ("1/2 of the training set", "k-0.5"),
            ("full training set (Real-Fake)", "real-fake-1"),
            ("full training set, on the fly", "k-1"),
        ),
    ),
    "10": Table(
        "dropped by VoG",
        (
            ("0% (Real-Fake)", "real-fake-1"),
            ("0%, on the fly", "perturbed"),
            ("25%", "vog-0.25"),
            ("50%", "vog-0.5"),
            ("75%", "vog-0.75"),
            ("100% (only real data)", BASELINE),
        ),
    ),
    "15": Table(
        "synthetic data quantity",
        (
            ("only real data", BASELINE),
            ("Real-Fake (1:1)", "real-fake-1"),
            ("Real-Fake (1:2)", "real-fake-2"),
            ("GenDataAgent (1:0.1)", "quantity-0.1"),
            ("Real-Fake (1:5)", "real-fake-5"),
            ("GenDataAgent (1:0.25)", "quantity-0.25"),
            ("Real-Fake (1:10)", "real-fake-10"),
            ("GenDataAgent (1:0.5)", "quantity-0.5"),
            ("GenDataAgent (1:1)", ON_THE_FLY),
        ),
    ),
    "lookahead": Table("lookahead before each update", (("GenDataAgent", ON_THE_FLY), ("+ lookahead", "lookahead"))),
    "thresholds": Table(
        "who sets the thresholds",
        (("by hand", ON_THE_FLY), ("automatically (k and so quantity vary)", "automatic-thresholds")),
    ),
    "modes": Table(
        "when samples are made", (("synchronous", "sync"), ("asynchronous", "async"), ("offline", "offline"))
    ),
}


TABLES = GENDATAAGENT | identity.TABLES | expressions.TABLES


def arms(recipe: config.Settings) -> dict[str, Changes]:
    """Every arm that the recipe has, by name: GenDataAgent's where it classifies, RL-identity's where it tunes, ARGen's
    where it learns a policy for clips."""
    classifies = recipe.get("trainer", {}).get("task", "classification") == "classification"
    return (_gendataagent(recipe) if classifies else {}) | identity.arms(recipe) | expressions.arms(recipe)


def _gendataagent(recipe: config.Settings) -> dict[str, Changes]:
    """GenDataAgent is the recipe, but with as many synthetic images as real ones (1:1), with VoG, and without
    lookahead, which is another paper's."""
    no_lookahead = {"trainer.lookahead.enabled": False}
    real = no_lookahead | {"trainer.mode": "real"}
    on_the_fly = no_lookahead | _asking(_k(recipe), 1.0) | {"trainer.vog.enabled": True}
    no_vog = on_the_fly | {"trainer.vog.enabled": False}
    marginal = no_vog | {"agent.perturb": "none"}
    static = marginal | {
        "trainer.mode": "offline",
        "trainer.pool_match": "all",
        "trainer.warmup_iterations": 0,  # on all of its data from the start
    }
    explorer = no_vog | {
        "trainer.feedback.criterion": "similarity",
        "trainer.similarity.enabled": True,
        "trainer.similarity.fraction": _table(recipe, "vog").get("fraction", 0.25),  # drops as many
    }
    return {
        BASELINE: real,
        **{f"real-fake-{r}": static | {"trainer.feedback.images_per_sample": r} for r in (1, 2, 5, 10)},
        ON_THE_FLY: on_the_fly,
        "perturbed": no_vog,
        "marginal": marginal,
        "entropy": on_the_fly | {"trainer.feedback.criterion": "entropy"},
        **{f"checkpoints-{n}": on_the_fly | {"trainer.warmup_iterations": n} for n in (3, 4, 5)},
        "randaugment": real | {"trainer.model.randaugment": 2},
        "internet-explorer": explorer,
        **{f"k-{k:g}": marginal | _asking(k, 1.0) for k in (0.2, 0.25, 0.5, 1.0)},
        **{f"strength-{s:g}": marginal | _asking(0.2, 1.0) | {"agent.strength": s} for s in (0.5, 0.75, 0.9)},
        **{f"vog-{f:g}": on_the_fly | {"trainer.vog.fraction": f} for f in (0.25, 0.5, 0.75)},
        **{f"quantity-{r:g}": on_the_fly | _asking(_k(recipe), r) for r in (0.1, 0.25, 0.5)},
        "lookahead": on_the_fly | {"trainer.lookahead.enabled": True},
        "automatic-thresholds": on_the_fly | {"trainer.thresholds.auto": True},
        **{mode: on_the_fly | {"trainer.mode": mode} for mode in ("sync", "async", "offline")},
    }


def _k(recipe: config.Settings) -> float:
    return _table(recipe, "feedback").get("fraction", 0.2)


def _table(recipe: config.Settings, name: str) -> Mapping[str, Any]:
    return recipe.get("trainer", {}).get(name, {})


def _asking(k: float, ratio: float) -> dict[str, Any]:
    """Ask each iteration for `ratio` synthetic images a real one: m whole images of each of k (about) of them."""
    images = max(1, round(ratio / k))
    return {"trainer.feedback.fraction": ratio / images, "trainer.feedback.images_per_sample": images}


def overrides(changes: Changes) -> list[str]:
    """As `--set` takes them."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()]


def same(recipe: config.Settings, every: Mapping[str, Changes]) -> dict[str, str]:
    """Name of an arm -> the first arm with equal settings: the one of them that is run."""
    firsts: list[tuple[config.Settings, str]] = []
    found = {}
    for name, changes in every.items():
        settings = recipe.overridden(overrides(changes))
        found[name] = next((first for known, first in firsts if known == settings), name)
        if found[name] == name:
            firsts.append((settings, name))
    return found


def chosen(names: Iterable[str] | None, recipe: config.Settings) -> dict[str, Table]:
    """The tables of these names; None: ARGen's where the recipe recognises clips, RL-identity's where it tunes its
    generator, else GenDataAgent's.

    Raises:
        ConfigError: there is no such table, or the recipe lacks arms of it.
    """
    known = arms(recipe)
    if names is None:
        tuned = identity.TABLES if identity.OURS in known else GENDATAAGENT
        own = expressions.TABLES if expressions.makes_clips(recipe) else tuned
        names = [name for name, table in own.items() if all(arm in known for _, arm in table.rows)]
    wanted = list(names)
    if unknown := [name for name in wanted if name not in TABLES]:
        raise ConfigError(f"no table {unknown[0]!r}: there are {', '.join(TABLES)}", param="tables")
    for name in wanted:
        _check_arms(name, known)
    if not wanted:
        raise ConfigError(
            "no table suits this recipe: it neither classifies nor has [agent.tune], nor [agent.policy] for clips",
            param="tables",
        )
    return {name: TABLES[name] for name in wanted}


def _check_arms(table: str, known: Mapping[str, Changes]) -> None:
    missing = [arm for _, arm in TABLES[table].rows if arm not in known]
    if not missing:
        return
    if table in GENDATAAGENT:
        needs = "task classification"
    elif table in expressions.TABLES:
        needs = "task video and a policy that is learnt, by a table [agent.policy]"
    elif identity.OURS in known:
        needs = "another backbone, in [recipe.vit]"
    else:
        needs = "a generator that is tuned, by a table [agent.tune]"
    raise ConfigError(f"table {table} has an arm {missing[0]!r}, for which the recipe needs {needs}", param="tables")


def arms_of(tables: Mapping[str, Table], run_as: Mapping[str, str]) -> Sequence[str]:
    """The arms to run for some tables, each once; the baseline, which the gains are over, is always the first."""
    named = [BASELINE, *(arm for table in tables.values() for _, arm in table.rows)]
    return list(dict.fromkeys(run_as[arm] for arm in named))
