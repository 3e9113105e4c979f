"""The arms of ARGen's ablations (Tables 2 to 5), as what each changes in a recipe that makes clips by a learnt policy.

Knows nothing of how arms are run, nor of what came out.
"""

from __future__ import annotations

from agent.ablation.table import BASELINE, Changes, Table
from agent.settings import AgentConfig
from protocol import config

ARGEN = "argen"
LOOKS = ("quality", "face", "amplitude")  # rewards of how a clip looks; the one for steps is in every arm
CONSTANT = 9.0  # guidance of all frames alike, TI2V-Zero's
BACKBONES = {  # as Table 2 calls them -> network of each frame, and the one over the frames
    "Res18_LSTM": ("resnet18", "lstm"),
    "Res18_Transformer": ("resnet18", "transformer"),
    "VGG13_LSTM": ("vgg13", "lstm"),
    "VGG13_Transformer": ("vgg13", "transformer"),
}
ARM_OF = {name: "-".join(parts) for name, parts in BACKBONES.items()}

TABLES: dict[str, Table] = {
    "argen-2": Table(
        "backbones",
        tuple(
            (f"{name}, {status}", arm + suffix)
            for name, arm in ARM_OF.items()
            for status, suffix in (("Original", "-real"), ("ARGen", ""))
        ),
        over={arm: f"{arm}-real" for arm in ARM_OF.values()}
        | {f"{arm}-real": f"{arm}-real" for arm in ARM_OF.values()},
    ),
    "argen-3": Table(
        "the two stages",
        (
            ("Original", BASELINE),
            ("ARGen (w/o ASI)", "without-asi"),
            ("ARGen (w/o ARD)", "without-ard"),
            ("ARGen", ARGEN),
        ),
    ),
    "argen-4": Table(
        "rewards",
        (
            ("steps", "reward-steps"),
            ("+ quality", "reward-quality"),
            ("+ face and amplitude", "reward-face"),
            ("+ quality, face and amplitude", ARGEN),
        ),
        distances=True,
    ),
    "argen-5": Table(
        "parts of the stages",
        (
            ("Fixed prompts (baseline)", "ti2v-zero"),
            ("VLM-only", "vlm-only"),
            ("VLM+RAG", "without-ard"),
            ("Reinforce-only", "steps-only"),
            ("Random policy", "random-policy"),
            ("Learned policy", "without-asi"),
        ),
        distances=True,
    ),
}


def makes_clips(recipe: config.Settings) -> bool:
    """Whether the recipe's trainer recognises clips."""
    return recipe.get("trainer", {}).get("task") == "video"


def arms(recipe: config.Settings) -> dict[str, Changes]:
    """Every arm that the recipe has, by name; none where it learns no policy for clips. ARGen is the recipe."""
    agent = config.section(recipe, "agent", AgentConfig)
    if not makes_clips(recipe) or agent.policy is None:
        return {}
    weights = {name: term.weight for name, term in agent.policy.rewards.items()}

    def rewarded(*names: str) -> Changes:
        """By steps, and by these of the rewards of how a clip looks."""
        kept = {name: 0.0 if name in LOOKS and name not in names else weight for name, weight in weights.items()}
        return {f"agent.policy.rewards.{name}.weight": weight for name, weight in kept.items()}

    fixed = {"agent.expressions.composer": "fixed"}
    # Without a policy guidance is of all frames alike, and steps are as the recipe says
    unchosen = {
        "agent.policy": False,
        "agent.expressions.policy": False,
        "agent.expressions.guidance_scale": CONSTANT,
    }
    if agent.expressions.guidance is not None:
        unchosen |= {f"agent.expressions.guidance.{end}": CONSTANT for end in ("minimum", "maximum")}
    only_steps = rewarded("quality") | {  # as the paper says of it: by steps and quality, and without a curve
        "agent.policy.actions.pairs": [[2.0, 2.0]],
        "agent.policy.actions.minimum": CONSTANT,
        "agent.policy.actions.maximum": CONSTANT,
    }
    real = {"agent.policy": False, "trainer.mode": "real"}
    networks = {
        ARM_OF[name]: {"trainer.model.model": frame, "trainer.model.head": sequence}
        for name, (frame, sequence) in BACKBONES.items()
    }
    return {
        BASELINE: real,
        ARGEN: {},
        **networks,
        **{f"{arm}-real": real | network for arm, network in networks.items()},
        "without-asi": fixed,
        "without-ard": unchosen,
        "ti2v-zero": fixed | unchosen,
        "vlm-only": unchosen | {"agent.expressions.retrieval": False},
        "reward-steps": rewarded(),
        "reward-quality": rewarded("quality"),
        "reward-face": rewarded("face", "amplitude"),
        "steps-only": fixed | only_steps,
        "random-policy": fixed | {"agent.policy.method": "random"},
    }
