"""The arms of RL-identity's ablations (Figures 5 and 6), as what each changes in a recipe that tunes its generator.

Knows nothing of how arms are run, nor of what came out.
"""

from __future__ import annotations

from agent.ablation.table import BASELINE, Changes, Table
from agent.recipes import RecipeConfig
from agent.settings import AgentConfig
from protocol import config

OURS = "ours"
REWARDS = ("semantic", "coverage", "expression")  # in the order in which Figure 5 adds them
ERASING = 0.5  # probability of random erasing, its paper's (Zhong et al. 2020)

TABLES: dict[str, Table] = {
    "figure-5": Table(
        "components",
        (
            ("only real data", BASELINE),
            ("base DiT", "base-dit"),
            ("+ dynamic sample selection", "selection"),
            ("+ semantic reward", "reward-semantic"),
            ("+ coverage reward", "reward-coverage"),
            ("+ expression reward", OURS),
        ),
    ),
    "figure-6": Table(
        "backbones",
        (
            ("CNN", BASELINE),
            ("CNN, random erasing", "erasing"),
            ("CNN, ours", OURS),
            ("ViT", "vit"),
            ("ViT, random erasing", "vit-erasing"),
            ("ViT, ours", "vit-ours"),
        ),
        over={"vit": "vit", "vit-erasing": "vit", "vit-ours": "vit"},
    ),
}


def arms(recipe: config.Settings) -> dict[str, Changes]:
    """Every arm that the recipe has, by name; none where it does not tune its generator. Ours is the recipe, with
    lookahead; it is without random erasing, as is the baseline."""
    tune = config.section(recipe, "agent", AgentConfig).tune
    if tune is None:
        return {}
    weights = {name: term.weight for name, term in tune.rewards.items()}

    def rewarded(names: tuple[str, ...]) -> dict[str, object]:
        """Tuned by these of the paper's rewards."""
        off = [name for name in REWARDS if name in weights and name not in names]
        kept = {name: 0.0 if name in off else weight for name, weight in weights.items()}
        return {f"agent.tune.rewards.{name}.weight": weight for name, weight in kept.items()} if off else {}

    plain = {"trainer.model.random_erasing": 0.0}
    real = plain | _untuned() | {"trainer.mode": "real", "trainer.lookahead.enabled": False}
    ours = plain | {"trainer.lookahead.enabled": True}
    found: dict[str, Changes] = {
        BASELINE: real,
        "base-dit": plain | _untuned() | {"trainer.lookahead.enabled": False},
        "selection": ours | _untuned(),
        "reward-semantic": ours | rewarded(REWARDS[:1]),
        "reward-coverage": ours | rewarded(REWARDS[:2]),
        OURS: ours,
        "erasing": real | {"trainer.model.random_erasing": ERASING},
    }
    if vit := config.section(recipe, "recipe", RecipeConfig).vit:
        other = {f"trainer.{key}": value for key, value in vit.items()}
        found |= {
            f"vit{name}": found[arm] | other for name, arm in (("", BASELINE), ("-erasing", "erasing"), ("-ours", OURS))
        }
    return found


def _untuned() -> dict[str, object]:
    return {"agent.tune": False, "agent.tune_while_training": False}
