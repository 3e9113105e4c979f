"""Pairs of face verification from lists in their published formats: which pictures, which pairs, which folds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.errors import BadFile, DatasetError
from tests.protocol.test_dataset_identity import picture
from trainer.data.pair_lists import Pair, flagged, lfw, table, two_lines
from trainer.data.pair_sets import Pairs, PairsConfig, open_pairs
from trainer.metrics.verification import verify


def pictures(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        picture(root / name, number)


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def opened(layout: str, root: Path, **more) -> Pairs:
    return open_pairs(PairsConfig(name="set", layout=layout, root=root, **more))


def read(pairs: Pairs) -> list[tuple[str, str, bool, int]]:
    """Every pair by the paths of its pictures."""
    names = [entry.relative for entry in pairs.dataset.samples]
    rows = zip(pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist(), pairs.fold.tolist(), strict=True)
    return [(names[first], names[second], same, fold) for first, second, same, fold in rows]


def write_lfw(root: Path) -> list[str]:
    """Ten folds of 1 + 1 pairs: Ann_k with herself, and with Bob. Returns the list's lines."""
    lines = ["10\t1"]
    for fold in range(10):
        pictures(root, *(f"Ann_{fold}/Ann_{fold}_{n:04d}.jpg" for n in (1, 12)))
        lines += [f"Ann_{fold}\t1\t12", f"Ann_{fold}\t12\tBob\t2"]
    pictures(root, "Bob/Bob_0002.jpg", "Bob/Bob_0001.jpg")
    return lines


# ---------------------------------------------------------------- each layout


@pytest.mark.parametrize("place", ["in it", "beside it", "named", "folder"])
def test_lfw(tmp_path: Path, place: str):
    root = tmp_path / "lfw"
    folder = {"in it": root, "beside it": tmp_path}.get(place, tmp_path / "lists")
    path = text(folder / "pairs.txt", *write_lfw(root))
    more = {"named": {"pairs": path}, "folder": {"pairs": folder}}.get(place, {})
    pairs = opened("lfw", root, **more)
    expected = []
    for fold in range(10):
        ann = [f"Ann_{fold}/Ann_{fold}_{n:04d}.jpg" for n in (1, 12)]
        expected += [(ann[0], ann[1], True, fold), (ann[1], "Bob/Bob_0002.jpg", False, fold)]
    assert read(pairs) == expected
    assert len(pairs.dataset) == 21  # Bob is in ten pairs, and his other picture in none
    assert (pairs.name, pairs.group) == ("set", None)
    assert pairs.first.dtype == pairs.second.dtype == pairs.fold.dtype == torch.int64
    assert pairs.same.dtype == torch.bool
    assert pairs.dataset.image(int(pairs.second[0])).mean() == pytest.approx(1, abs=1)


def test_agedb_30(tmp_path: Path):
    pictures(tmp_path / "images", *(f"{n}.jpg" for n in range(40)))
    lines = [f"{2 * n}.jpg {2 * n + 1}.jpg {1 if n < 10 else 0}" for n in range(20)]
    text(tmp_path / "agedb_30_pair.txt", *lines)
    pairs = opened("agedb-30", tmp_path / "images")
    assert read(pairs) == [(f"{2 * n}.jpg", f"{2 * n + 1}.jpg", n < 10, n % 10) for n in range(20)]


def write_cfp(root: Path) -> None:
    """Three people of two frontal and one profile picture each, in the published folders."""
    frontal = [f"{who:03d}/frontal/{n:02d}.jpg" for who in (1, 2, 3) for n in (1, 2)]
    profile = [f"{who:03d}/profile/01.jpg" for who in (1, 2, 3)]
    pictures(root / "Data" / "Images", *frontal, *profile)
    for pose, names in (("F", frontal), ("P", profile)):
        lines = [f"{number} ../Data/Images/{name}" for number, name in enumerate(names, start=1)]
        text(root / "Protocol" / f"Pair_list_{pose}.txt", *lines)
    for fold in range(1, 11):
        text(root / "Protocol" / "Split" / "FP" / f"{fold:02d}" / "same.txt", "1,1", "4,2")
        text(root / "Protocol" / "Split" / "FP" / f"{fold:02d}" / "diff.txt", "6,1")


def test_cfp_fp(tmp_path: Path):
    write_cfp(tmp_path)
    folds = [
        [
            ("Data/Images/001/frontal/01.jpg", "Data/Images/001/profile/01.jpg", True, fold),
            ("Data/Images/002/frontal/02.jpg", "Data/Images/002/profile/01.jpg", True, fold),
            ("Data/Images/003/frontal/02.jpg", "Data/Images/001/profile/01.jpg", False, fold),
        ]
        for fold in range(10)
    ]
    assert read(opened("cfp-fp", tmp_path)) == [pair for fold in folds for pair in fold]
    aligned = tmp_path / "aligned"
    (tmp_path / "Data" / "Images").rename(aligned)
    elsewhere = read(opened("cfp-fp", aligned, pairs=tmp_path / "Protocol"))
    assert elsewhere[0] == ("001/frontal/01.jpg", "001/profile/01.jpg", True, 0) and len(elsewhere) == 30


@pytest.mark.parametrize(("layout", "name"), [("calfw", "pairs_CALFW.txt"), ("cplfw", "pairs_CPLFW.txt")])
def test_calfw_and_cplfw(tmp_path: Path, layout: str, name: str):
    """Pairs of the same people first, with their fold; then those of different people, with 0."""
    pictures(
        tmp_path / "aligned images", *(f"A_B_{n:04d}.jpg" for n in range(40)), *(f"C_{n:04d}.jpg" for n in range(20))
    )
    lines = []
    for pair in range(20):
        lines += [f"A_B_{2 * pair:04d}.jpg {pair // 2 + 1}", f"A_B_{2 * pair + 1:04d}.jpg {pair // 2 + 1}"]
    for pair in range(20):
        lines += [f"A_B_{pair:04d}.jpg 0", f"C_{pair:04d}.jpg 0"]
    text(tmp_path / name, *lines)
    below = "aligned images/"
    expected = [(f"{below}A_B_{2 * n:04d}.jpg", f"{below}A_B_{2 * n + 1:04d}.jpg", True, n // 2) for n in range(20)] + [
        (f"{below}A_B_{n:04d}.jpg", f"{below}C_{n:04d}.jpg", False, n // 2) for n in range(20)
    ]
    assert read(opened(layout, tmp_path)) == expected
    unfolded = [(*(one.removeprefix(below) for one in row[:2]), *row[2:]) for row in expected]
    assert read(opened(layout, tmp_path / "aligned images")) == unfolded
    flags = [line.split()[0] + (" 0" if line.endswith(" 0") else " 1") for line in lines]
    text(tmp_path / name, *flags)
    assert read(opened(layout, tmp_path)) == expected


def test_rfw_by_ethnicity(tmp_path: Path):
    for group in ("African", "Asian"):
        data = tmp_path / "data" / group
        pictures(data, *(f"m.0{n}x/m.0{n}x_000{k}.jpg" for n in range(3) for k in (1, 2)))
        same = [f"m.0{n}x\t1\t2" for n in (0, 1)]
        text(tmp_path / "txts" / group / f"{group}_pairs.txt", *same, "m.00x\t1\tm.01x\t2", "m.00x\t1\tm.02x\t1")
    pairs = opened("rfw", tmp_path, group="Asian")
    below = "data/Asian/"
    assert pairs.group == "Asian"
    assert read(pairs) == [
        (f"{below}m.00x/m.00x_0001.jpg", f"{below}m.00x/m.00x_0002.jpg", True, 0),
        (f"{below}m.01x/m.01x_0001.jpg", f"{below}m.01x/m.01x_0002.jpg", True, 5),
        (f"{below}m.00x/m.00x_0001.jpg", f"{below}m.01x/m.01x_0002.jpg", False, 0),
        (f"{below}m.00x/m.00x_0001.jpg", f"{below}m.02x/m.02x_0001.jpg", False, 5),
    ]
    assert len(pairs.dataset) == 5
    with pytest.raises(DatasetError, match=r"no Indian/Indian_pairs.txt in .*txts"):
        opened("rfw", tmp_path, group="Indian")


def test_a_table_of_ones_own(tmp_path: Path):
    pictures(tmp_path, "a, b/1.png", "c/2.png", "c/3.png")
    path = text(tmp_path / "mine.csv", "first,second,same,fold", '"a, b/1.png",c/2.png,0,0', "c/2.png,./c/3.png,1,9")
    assert read(opened("csv", tmp_path, pairs=path)) == [
        ("a, b/1.png", "c/2.png", False, 0),
        ("c/2.png", "c/3.png", True, 9),
    ]
    text(
        tmp_path / "pairs.csv",
        "first,second,same",
        *(f"c/{2 + n % 2}.png,c/{3 - n % 2}.png,{n % 2}" for n in range(40)),
    )
    assert opened("csv", tmp_path).fold.tolist() == [n // 4 for n in range(40)]


def test_the_verification_of_what_was_read(tmp_path: Path):
    text(tmp_path / "pairs.txt", *write_lfw(tmp_path))
    pairs = opened("lfw", tmp_path)
    assert verify(torch.where(pairs.same, 0.9, 0.1), pairs.same, pairs.fold).accuracy == 1.0


# ---------------------------------------------------------------- malformed lists

LFW = ["10 1", *(line for k in range(10) for line in (f"A{k} 1 2", f"A{k} 1 B 1"))]
MALFORMED = [
    (lfw, [*LFW[:3], "A1 1", *LFW[4:]], r"line 4: expected `name i j` or `name1 i name2 j`, and found 'A1 1'"),
    (lfw, [*LFW[:3], "A1 one 2", *LFW[4:]], r"line 4: expected `name i j`"),
    (lfw, [*LFW[:3], "A1 1 B 2 x", *LFW[4:]], r"line 4: expected `name i j`"),
    (lfw, [*LFW[:3], "A1 1 B 2", *LFW[4:]], r"line 4: expected 1 pairs of the same person .* as pair 1 of fold 2"),
    (lfw, LFW[:-1], r"line 1: says 10 folds of 1 \+ 1 pairs, and 19 lines follow, not 20"),
    (lfw, ["500", *LFW[1:]], r"line 1: expected `10 300`.*found '500': take pairs.txt, the list of View 2"),
    (lfw, ["5 2", *LFW[1:]], r"line 1: expected `10 300`"),
    (lfw, ["..  1 2"], r"line 1: .* is no path below the folder"),
    (lfw, ["/etc 1 2"], r"line 1: '/etc//etc_0001.jpg' is no path below the folder"),
    (
        two_lines,
        ["a.jpg 1", "b.jpg 1", "c.jpg"],
        r"line 3: expected a picture and a number from 0 to 10, and found 'c.jpg'",
    ),
    (two_lines, ["a.jpg 11", "b.jpg 11"], r"line 1: expected a picture and a number from 0 to 10"),
    (two_lines, ["a.jpg -1", "b.jpg -1"], r"line 1: expected a picture and a number"),
    (
        two_lines,
        ["a.jpg 1", "b.jpg 1", "c.jpg 0"],
        r"line 3: expected two lines for each pair, and the last has no second",
    ),
    (two_lines, ["a.jpg 1", "b.jpg 0"], r"line 2: expected number 1, as on the line before of this pair"),
    (two_lines, ["../a.jpg 1", "b.jpg 1"], r"line 1: '../a.jpg' is no path below"),
    (flagged, ["a.jpg b.jpg 1", "", "a.jpg b.jpg"], r"line 3: expected `picture1 picture2 1`"),
    (flagged, ["a.jpg b.jpg 2"], r"line 1: expected `picture1 picture2 1`"),
    (flagged, ["a.jpg b\\c.jpg 1"], r"line 1: .* is no path below"),
    (table, ["one,two,same"], r"line 1: expected the header first,second,same\[,fold\], and found 'one,two,same'"),
    (table, ["first,second,same", "a,b"], r"line 2: expected first,second,same with same 0 or 1, and found 'a,b'"),
    (table, ["first,second,same", "a,b,yes"], r"line 2: expected first,second,same with same 0 or 1"),
    (table, ["first,second,same", "a,b,1,3"], r"line 2: expected first,second,same with same 0 or 1"),
    (table, ["first,second,same,fold", "a,b,1,10"], r"line 2: expected .* with same 0 or 1 and fold 0 to 9"),
    (table, ["first,second,same,fold", "a,b,1,"], r"line 2: expected .* and fold 0 to 9"),
    (table, ["first,second,same", ",b,1"], r"line 2: '' is no path below"),
]


@pytest.mark.parametrize(("reader", "lines", "told"), MALFORMED)
def test_a_malformed_line_is_named(tmp_path: Path, reader, lines: list[str], told: str):
    with pytest.raises(DatasetError, match=rf"list.txt, {told}"):
        list(reader(text(tmp_path / "list.txt", *lines)))


@pytest.mark.parametrize(
    ("file", "lines", "told"),
    [
        ("Split/FP/03/diff.txt", ["6,1", "6;1"], r"03/diff.txt, line 2: expected `i,j`, and found '6;1'"),
        ("Split/FP/03/same.txt", ["1,4"], r"03/same.txt, line 1: Pair_list_P.txt has no picture 4 \('1,4'\)"),
        ("Split/FP/03/same.txt", ["0,1"], r"03/same.txt, line 1: Pair_list_F.txt has no picture 0"),
        ("Pair_list_F.txt", ["../Data/Images/001/frontal/01.jpg"], r"Pair_list_F.txt, line 1: expected `1 ../Data/Ima"),
        ("Pair_list_P.txt", ["1 ../../elsewhere/01.jpg"], r"Pair_list_P.txt, line 1: expected `1 ../Data/Images/001"),
        ("Pair_list_P.txt", ["1"], r"Pair_list_P.txt, line 1: expected `1 ../Data/Images/001/frontal/01.jpg`"),
    ],
)
def test_a_malformed_line_of_cfp_is_named(tmp_path: Path, file: str, lines: list[str], told: str):
    write_cfp(tmp_path)
    text(tmp_path / "Protocol" / file, *lines)
    with pytest.raises(DatasetError, match=told):
        opened("cfp-fp", tmp_path)
    (tmp_path / "Protocol" / file).unlink()
    with pytest.raises(DatasetError, match=rf"the list .*{file} does not exist"):
        opened("cfp-fp", tmp_path)


@pytest.mark.parametrize("body", [b"\x80\x03]q\x00(", b"MATLAB 5.0\0\0\0"])
def test_binary_lists_are_not_read(tmp_path: Path, body: bytes):
    (tmp_path / "agedb_30.bin").write_bytes(body)
    with pytest.raises(DatasetError, match=r"agedb_30.bin is not text: .mat and .bin files are not read, take a list"):
        opened("agedb-30", tmp_path, pairs=tmp_path / "agedb_30.bin")


@pytest.mark.parametrize("reader", [lfw, two_lines, flagged, table])
def test_an_empty_list_is_told(tmp_path: Path, reader):
    with pytest.raises(DatasetError, match=r"list.txt is empty"):
        list(reader(text(tmp_path / "list.txt", "", " ")))


# ---------------------------------------------------------------- what the list asks for is not there


def test_no_folder_and_no_list(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"set: the folder .*nowhere does not exist"):
        opened("lfw", tmp_path / "nowhere")
    (tmp_path / "lfw").mkdir()
    with pytest.raises(
        DatasetError, match=r"set: no pairs.txt in .*lfw or .*: put it there, or name it in `pairs`"
    ) as told:
        opened("lfw", tmp_path / "lfw")
    assert told.value.param == "pairs"
    with pytest.raises(DatasetError, match=r"the list .*lfw/pairs.txt does not exist"):
        opened("lfw", tmp_path / "lfw", pairs=tmp_path / "lfw")
    with pytest.raises(DatasetError, match=r"the list .*mine.txt does not exist"):
        opened("lfw", tmp_path / "lfw", pairs=tmp_path / "mine.txt")


def test_missing_pictures_are_counted_and_the_first_is_named(tmp_path: Path):
    text(tmp_path / "pairs.txt", *write_lfw(tmp_path))
    for name in ("Ann_3/Ann_3_0012.jpg", "Bob/Bob_0002.jpg"):
        (tmp_path / name).unlink()
    with pytest.raises(DatasetError, match=r"pairs.txt, line 8: .*Ann_3_0012.jpg is missing \(2 of 21 pictures are\)"):
        opened("lfw", tmp_path)


def test_a_picture_that_is_none_is_named(tmp_path: Path):
    text(tmp_path / "pairs.txt", *write_lfw(tmp_path))
    (tmp_path / "Bob/Bob_0002.jpg").write_bytes(b"no picture")
    with pytest.raises(BadFile, match=r"Bob_0002.jpg: .*not an image.* \(1 of 21 pictures are bad\)"):
        opened("lfw", tmp_path)


def test_a_link_that_leads_out_is_not_followed_unless_named(tmp_path: Path):
    root = tmp_path / "lfw"
    text(root / "pairs.txt", *write_lfw(root))
    (tmp_path / "elsewhere").mkdir()
    (root / "Bob/Bob_0002.jpg").rename(tmp_path / "elsewhere" / "bob.jpg")
    (root / "Bob/Bob_0002.jpg").symlink_to(tmp_path / "elsewhere" / "bob.jpg")
    with pytest.raises(BadFile, match=r"Bob_0002.jpg: it leads out of the dataset.*links_to"):
        opened("lfw", root)
    assert len(opened("lfw", root, links_to=[tmp_path / "elsewhere"]).dataset) == 21


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["a.png b.png 1", "c.png a.png 1"], "lacks the latter"),
        (["a.png b.png 0", "c.png a.png 0"], "lacks the former"),
        (["a.png b.png 1", "c.png ./c.png 0"], r"line 2: c.png is paired with itself"),
        (["a.png b.png 1", "c.png a.png 0"], "all pairs are in one fold"),
    ],
)
def test_pairs_that_nothing_can_be_verified_with(tmp_path: Path, lines: list[str], told: str):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    text(tmp_path / "agedb_30_pair.txt", *lines)
    with pytest.raises(DatasetError, match=told):
        opened("agedb-30", tmp_path)


def test_a_table_with_a_header_alone(tmp_path: Path):
    text(tmp_path / "pairs.csv", "first,second,same")
    with pytest.raises(DatasetError, match="lacks both"):
        opened("csv", tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"layout": "rfw"},
        {"layout": "lfw", "group": "Asian"},
        {"layout": "rfw", "group": "Martian"},
        {"layout": "ijb-c"},
        {"layout": "lfw", "name": ""},
        {"layout": "lfw", "folds": 5},
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, fields: dict):
    with pytest.raises(ValidationError):
        PairsConfig(**({"name": "set", "root": tmp_path} | fields))


# ---------------------------------------------------------------- what is written is read

NAMES = st.text(alphabet="abzAZ09_-.éß", min_size=1, max_size=8).filter(lambda name: name.strip("."))


@settings(deadline=None)  # the disk is shared
@given(rows=st.lists(st.tuples(NAMES, st.integers(1, 9999), NAMES, st.integers(1, 9999)), min_size=1, max_size=5))
def test_lists_hold_what_was_written_into_them(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int, str, int]]
):
    path = tmp_path_factory.getbasetemp() / "round-trip.txt"
    path.write_text("".join(f"{a}\t{i}\t{b}\t{j}\n" for a, i, b, j in rows), encoding="utf-8")
    found = [(pair.first, pair.second, pair.same) for pair in lfw(path)]
    assert found == [(f"{a}/{a}_{i:04d}.jpg", f"{b}/{b}_{j:04d}.jpg", a == b) for a, i, b, j in rows]
    path.write_text("".join(f"{a} {b} {i % 2}\n" for a, i, b, _ in rows), encoding="utf-8")
    where = [f"{path}, line {number}" for number in range(1, len(rows) + 1)]
    assert list(flagged(path)) == [
        Pair(a, b, bool(i % 2), None, line) for (a, i, b, _), line in zip(rows, where, strict=True)
    ]
