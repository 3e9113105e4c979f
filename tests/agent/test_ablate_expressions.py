"""The arms of ARGen's tables, the numbers it prints, and the columns that clips add to a table."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent import ablate, recipes
from agent.ablation import grid, paper, show
from agent.ablation.expressions import TABLES
from agent.ablation.grid import BASELINE
from agent.ablation.results import UAR, Outcome, Result, outcome, table_result
from agent.settings import AgentConfig
from protocol import config
from protocol.errors import ConfigError
from trainer.settings import TrainerConfig

SOMEWHERE = ['trainer.dataset.root="/data"']


def arms(*said: str, recipe: str = "dfew") -> dict[str, tuple[AgentConfig, TrainerConfig]]:
    settings = config.load(recipes.find(recipe), [*SOMEWHERE, *said])
    found = {}
    for name, changes in grid.arms(settings).items():
        arm = settings.overridden(grid.overrides(changes))
        found[name] = (config.section(arm, "agent", AgentConfig), config.section(arm, "trainer", TrainerConfig))
    return found


def of_table(table: str, found: dict[str, tuple[AgentConfig, TrainerConfig]]) -> dict[str, Any]:
    return {label: found[arm] for label, arm in TABLES[table].rows}


def test_the_stages_of_table_3_are_left_out_one_at_a_time():
    rows = {
        label: (trainer.mode, agent.expressions.composer, agent.policy is not None, agent.expressions.policy)
        for label, (agent, trainer) in of_table("argen-3", arms()).items()
    }
    assert rows == {
        "Original": ("real", "local", False, True),
        "ARGen (w/o ASI)": ("offline", "fixed", True, True),
        "ARGen (w/o ARD)": ("offline", "local", False, False),
        "ARGen": ("offline", "local", True, True),
    }
    without, _ = arms()["without-ard"]
    assert (without.expressions.guidance_scale, without.expressions.guidance) == (9.0, None)


def test_a_curve_that_a_recipe_sets_is_flat_where_guidance_is_to_be_fixed():
    without, _ = arms("agent.expressions.guidance.maximum=12.0")["without-ard"]
    curve = without.expressions.guidance
    assert curve is not None and (curve.minimum, curve.maximum) == (9.0, 9.0)


def test_the_rewards_of_table_4_are_left_out_and_the_one_for_steps_stays():
    rows = {
        label: {name: term.weight for name, term in agent.policy.rewards.items()}
        for label, (agent, _) in of_table("argen-4", arms()).items()
    }
    steps = {"steps": 1.0, "quality": 0.0, "face": 0.0, "amplitude": 0.0}
    assert rows == {
        "steps": steps,
        "+ quality": steps | {"quality": 3.0},
        "+ face and amplitude": steps | {"face": 3.0, "amplitude": 3.0},
        "+ quality, face and amplitude": steps | {"quality": 3.0, "face": 3.0, "amplitude": 3.0},
    }
    own = "agent.policy.rewards={steps={weight=2.0}, quality={weight=1.0}, mine={weight=5.0}}"
    rewards = arms(own)["reward-steps"][0].policy.rewards
    assert {name: term.weight for name, term in rewards.items()} == {"steps": 2.0, "quality": 0.0, "mine": 5.0}


def test_the_parts_of_table_5():
    rows = of_table("argen-5", arms())
    told = {
        label: (agent.expressions.composer, agent.expressions.retrieval, agent.policy and agent.policy.method)
        for label, (agent, _) in rows.items()
    }
    assert told == {
        "Fixed prompts (baseline)": ("fixed", True, None),
        "VLM-only": ("local", False, None),
        "VLM+RAG": ("local", True, None),
        "Reinforce-only": ("fixed", True, "reinforce"),
        "Random policy": ("fixed", True, "random"),
        "Learned policy": ("fixed", True, "reinforce"),
    }
    space = rows["Reinforce-only"][0].policy.actions
    assert space.steps == [5, 10, 15, 20] and len(space.pairs) == 1 and space.minimum == space.maximum == 9.0
    kept = {name for name, term in rows["Reinforce-only"][0].policy.rewards.items() if term.weight}
    assert kept == {"steps", "quality"}
    assert {agent.expressions.policy for agent, _ in rows.values() if agent.policy} == {True}
    assert {agent.expressions.policy for agent, _ in rows.values() if not agent.policy} == {False}


def test_the_backbones_of_table_2_have_each_its_own_baseline():
    settings = config.load(recipes.find("ferv39k"), SOMEWHERE)
    run_as = grid.same(settings, grid.arms(settings))
    table = TABLES["argen-2"]
    found = arms(recipe="ferv39k")
    for label, arm in table.rows:
        name, status = label.split(", ")
        trainer = found[arm][1]
        frame, sequence = name.lower().replace("res", "resnet").split("_")
        assert (trainer.model["model"], trainer.model["head"]) == (frame, sequence)
        assert (trainer.mode, found[arm][0].policy is None) == (
            ("real", True) if status == "Original" else ("offline", False)
        )
        assert table.over[arm] == arm.removesuffix("-real") + "-real"
    assert (run_as["resnet18-transformer"], run_as["resnet18-transformer-real"]) == ("argen", BASELINE)
    outcomes = {(arm, 0): of(score) for arm, score in (("vgg13-lstm-real", 0.4), ("vgg13-lstm", 0.5), (BASELINE, 0.9))}
    rows = {row.label: row for row in table_result("argen-2", table, run_as, outcomes, {}, None).rows}
    assert rows["VGG13_LSTM, ARGen"].gain.mean == pytest.approx(0.1) and rows["VGG13_LSTM, Original"].gain is None


def test_recipes_have_the_tables_that_suit_them():
    dfew, pets, ckplus = (config.load(recipes.find(name), SOMEWHERE) for name in ("dfew", "pets", "ckplus"))
    assert list(grid.chosen(None, dfew)) == list(TABLES)
    for recipe in (pets, ckplus):
        with pytest.raises(
            ConfigError, match=r"needs task video and a policy that is learnt, by a table \[agent.policy\]"
        ):
            grid.chosen(["argen-3"], recipe)
    with pytest.raises(ConfigError, match=r"nor \[agent.policy\] for clips"):
        grid.chosen(None, ckplus)
    with pytest.raises(ConfigError, match="needs task classification"):
        grid.chosen(["3"], dfew)


def test_what_would_spoil_the_comparison_is_refused():
    for said, says in (
        ("agent.policy.activate=false", r"set activate = true in \[agent.policy\]"),
        ('trainer.test_split=""', "set trainer.test_split"),
    ):
        with pytest.raises(ConfigError, match=says):
            ablate._check(config.load(recipes.find("dfew"), [*SOMEWHERE, said]), {})
    ablate._check(config.load(recipes.find("dfew"), SOMEWHERE), {})


def test_tables_of_frechet_distances_want_a_network():
    recipe = recipes.find("dfew")
    ablate._check(config.load(recipe, SOMEWHERE), {name: TABLES[name] for name in ("argen-2", "argen-3")})
    with pytest.raises(ConfigError, match=r"argen-4, argen-5.*trainer\.measure\.video\.features"):
        ablate._check(config.load(recipe, SOMEWHERE), TABLES)
    named = "trainer.measure.video.features=torchscript:i3d.pt"
    ablate._check(config.load(recipe, [*SOMEWHERE, named]), TABLES)


# ---------------------------------------------------------------- what the paper prints


@pytest.mark.parametrize(
    ("table", "row", "dataset", "score", "second", "measured", "deviation"),
    [
        ("argen-2", "VGG13_LSTM, ARGen", "DFEW", 50.70, 63.50, {"surprise": 50.34, "disgust": 3.45, "fear": 25.97}, {}),
        (
            "argen-2",
            "Res18_LSTM, Original",
            "FERV39k",
            32.13,
            43.04,
            {"surprise": 19.44, "disgust": 5.78, "fear": 9.51},
            {},
        ),
        ("argen-3", "ARGen (w/o ARD)", "DFEW", 54.98, 67.06, {"surprise": 54.79, "disgust": 6.21, "fear": 37.73}, {}),
        (
            "argen-4",
            "+ face and amplitude",
            "CK+",
            None,
            None,
            {"FVD": 78.96, "sFVD": 203.93, "tFVD": 119.44},
            {"sFVD": 78.24, "tFVD": 60.51},
        ),
        (
            "argen-5",
            "Learned policy",
            "CK+",
            None,
            None,
            {"FVD": 58.50, "sFVD": 136.20, "tFVD": 87.50},
            {"sFVD": 51.37, "tFVD": 27.54},
        ),
    ],
)
def test_cells_are_as_printed(
    table: str, row: str, dataset: str, score: float, second: float, measured: dict, deviation: dict
):
    cell = paper.cell(table, row, dataset)
    assert cell is not None
    assert (cell.score, cell.second, cell.measured, cell.measured_deviation) == (score, second, measured, deviation)


@pytest.mark.parametrize("table", TABLES)
def test_every_row_has_the_paper_s_numbers(table: str):
    printed = tomllib.loads((Path(paper.__file__).parent / "paper.toml").read_text())[table]
    assert set(printed) - {"datasets", "columns"} == {label for label, _ in TABLES[table].rows}
    for label, _ in TABLES[table].rows:
        assert all(paper.cell(table, label, dataset) for dataset in printed["datasets"])
        assert paper.cell(table, label, "Pets") is None


# ---------------------------------------------------------------- columns


def of(score: float, **measured: Any) -> Outcome:
    return Outcome(headline=UAR, score=score, second=score + 0.1, hours={"training": 1.0}, missing=0, **measured)


def test_an_outcome_has_what_the_summary_of_a_run_on_clips_says():
    summary = {
        "headline": UAR,
        "score": 0.5,
        "test_top1": 0.6,
        "worst_case_disparity": 0.1,
        "device_hours": {"train": 2.0},
        "dead": 0,
        "outstanding": 1,
        "per_class": [0.9, 0.1, None],
        "scarce": {"fear": 1},
        "fvd": 12.5,
        "sfvd": None,
        "tfvd": 20.0,
    }
    found = outcome(summary)
    assert (found.headline, found.score, found.second, found.missing) == (UAR, 0.5, 0.6, 1)
    assert (found.recalls, found.scarce) == ([0.9, 0.1, None], {"fear": 1})
    assert found.distances == {"FVD": 12.5, "tFVD": 20.0}


def result() -> Result:
    """Two seeds of ARGen and one of the baseline, which asked for no class, in Table 3."""
    table = TABLES["argen-3"]
    run_as = {arm: arm for _, arm in table.rows}
    made = {"scarce": {"fear": 2, "disgust": 1}}
    outcomes = {
        (BASELINE, 0): of(0.5, recalls=[0.9, 0.1, 0.3]),
        ("argen", 0): of(0.6, recalls=[0.9, 0.2, 0.5], distances={"FVD": 10.0, "sFVD": 30.0}, **made),
        ("argen", 1): of(0.7, recalls=[0.9, 0.4, 0.6], distances={"FVD": 14.0}, **made),
    }
    return Result(
        recipe="dfew.toml",
        dataset="DFEW",
        headline=UAR,
        seeds=[0, 1],
        effort="as many epochs in every arm",
        tables={"argen-3": table_result("argen-3", table, run_as, outcomes, {}, "DFEW")},
    )


def test_scarce_classes_and_distances_are_columns_of_every_row():
    table = result().tables["argen-3"]
    assert table.columns == ["disgust", "fear", "FVD", "sFVD"]
    rows = {row.arm: row for row in table.rows}
    ours, base = rows["argen"].measured, rows[BASELINE].measured
    assert ours["disgust"].mean == pytest.approx(0.3) and ours["fear"].n == 2
    assert (ours["FVD"].mean, ours["sFVD"].mean, ours["sFVD"].n) == (12.0, 30.0, 1)
    assert base["disgust"].mean == pytest.approx(0.1) and base.keys() == {"disgust", "fear"}
    assert rows["without-asi"].measured == {}
    assert Result.model_validate(json.loads(result().model_dump_json())) == result()


def test_the_table_shows_ours_beside_the_paper_s():
    text = show.markdown(result())
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    header, ours = lines[0], next(line for line in lines if line[0] == "ARGen")
    cells = dict(zip(header, ours, strict=True))
    assert "ARGen Table 3: the two stages" in text
    assert cells["UAR, %"] == "65.0 ± 5.0"
    assert (cells["disgust, %"], cells["fear, %"]) == ("30.0 ± 10.0", "55.0 ± 5.0")
    assert (cells["FVD"], cells["sFVD"]) == ("12.00 ± 2.00", "30.00")
    assert (cells["paper: UAR"], cells["paper: disgust"], cells["paper: fear"]) == ("56.7", "11.72", "39.48")
    assert header.count("WAR, %") == 2 and "paper: FVD" not in header
    assert ours[header.index("WAR, %")] == "75.0 ± 5.0" and ours[header.index("paper: UAR") + 1] == "67.6"
    base = dict(zip(header, next(line for line in lines if line[0] == "Original"), strict=True))
    assert (base["disgust, %"], base["FVD"]) == ("10.0", "-")
    assert any(part for part in show.terminal(result()))


def test_distances_stand_beside_those_of_the_paper_with_their_spread():
    table, run_as = TABLES["argen-4"], {arm: arm for _, arm in TABLES["argen-4"].rows} | {BASELINE: BASELINE}
    outcomes = {("argen", 0): of(0.6, distances={"FVD": 10.0, "sFVD": 30.0, "tFVD": 20.0})}
    found = table_result("argen-4", table, run_as, outcomes, {}, "CK+")
    whole = result().model_copy(update={"dataset": "CK+", "tables": {"argen-4": found}})
    text = show.markdown(whole)
    ours = next(line for line in text.splitlines() if line.startswith("| + quality, face"))
    assert ours.endswith("| - | - | 56.75 | 133.62 ± 50.94 | 81.21 ± 27.07 |")
    assert "* sFVD and tFVD: the paper's ± is over the groups of clips, ours over seeds" in text
