"""The report's style sheet: light and dark, no font or file from elsewhere."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #1d1f24; --muted: #686d78; --grid: #dfe1e6;
  --real: #2f6fb3; --synthetic: #d9722b; --test: #12a17c; --good: #12805f; --bad: #7a2048;
  --score: #b9a3e3; --wait: #ecd97e; --vog: #a3246a; --similarity: #a3246a; --train: #2f6fb3; --evaluate: #8cc6ea;
  --save: #5f6670; --generate: #d9722b; --adapt: #4b2d73;
  --caption: #1f8f8a; --privacy: #a8741a; --publish: #6b7f1f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1c1f25; --ink: #e8e9ec; --muted: #9aa0ad; --grid: #343842;
    --real: #6ba8e5; --synthetic: #f09a56; --test: #4fc3a1; --good: #4fc3a1; --bad: #cc3d5c;
    --score: #c3b2f0; --wait: #ecd97e; --vog: #e05fa0; --similarity: #e05fa0; --train: #4f8fd0; --evaluate: #a3d2ee;
    --save: #8c95a1; --generate: #f09a56; --adapt: #7d5cb3;
    --caption: #59c2bd; --privacy: #d9a441; --publish: #aabf4f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { max-width: 46rem; margin: .4rem 0 1rem; }
.meta, .note, figcaption, small { color: var(--muted); font-size: .875rem; }
.warning { border-left: 3px solid var(--bad); padding-left: .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.6rem 0 0; }
.tile, .card { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; }
.tile { padding: .9rem 1.1rem; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .85rem; }
.tile .up, .tile .down { display: block; }
.tile .up { color: var(--good); } .tile .down { color: var(--bad); }
.card { padding: 1rem 1.2rem; overflow-x: auto; margin: 0; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: .8rem; }
.charts + .card, .card + .card { margin-top: .8rem; }
.charts .card { margin-top: 0; }
.card figcaption { margin-top: .7rem; max-width: 46rem; }
.drawn { overflow-x: auto; }
.swipe { display: none; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.wide svg { min-width: 44rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
caption { caption-side: bottom; text-align: left; color: var(--muted); font-size: .875rem; padding-top: .7rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .38rem .7rem; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 400; }
thead th, thead th:first-child { color: var(--muted); font-weight: 600; font-size: .875rem; overflow-wrap: anywhere; }
tbody tr:last-child > * { border-bottom: 0; }
td { white-space: nowrap; }
td.own { font-weight: 600; }
thead.words th, thead.words th:first-child { overflow-wrap: normal; }
td.time, th.time { white-space: nowrap; width: 7rem; }
.events td, .events th { text-align: left; white-space: normal; }
.flow { display: flex; height: 1.6rem; border-radius: .4rem; overflow: hidden; gap: 2px; margin-bottom: .7rem; }
.flow i { display: block; min-width: 2px; }
.legend {
  display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .4rem 0; padding: 0; list-style: none;
  font-size: .9rem;
}
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: .2rem; margin-right: .45rem; }
.rows { display: grid; gap: .2rem 1rem; grid-template-columns: max-content max-content 1fr; align-items: start; }
.rows > b { font-weight: 600; align-self: center; max-width: 12rem; overflow-wrap: anywhere; }
.rows > .head { color: var(--muted); font-size: .85rem; }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; }
.strip + .strip, .split { border-left: 1px solid var(--grid); padding-left: 1rem; }
figure { margin: 0; }
.picture { width: 4.6rem; text-align: center; }
.picture img, .picture .gone {
  display: block; width: 4.6rem; height: 4.6rem; object-fit: contain; border-radius: .35rem;
  background: var(--page); border: 2px solid transparent;
}
.picture .gone { display: grid; place-items: center; color: var(--muted); font-size: .75rem;
  border: 1px dashed var(--grid); }
.picture img.tiny { image-rendering: pixelated; }
.picture.kept img { border-color: var(--good); }
.picture.dropped img { border-color: var(--bad); border-style: dashed; }
.picture.near-copy img { border-color: var(--vog); border-style: dotted; }
.picture.too-near img { border-color: var(--privacy); border-style: dotted; }
.picture.not-used img { border-color: var(--muted); border-style: dotted; }
.picture figcaption { font-size: .72rem; line-height: 1.3; padding: .15rem 0 .4rem; white-space: nowrap; }
.prompts { grid-column: 1 / -1; font-size: .85rem; margin: 0 0 .6rem; }
.prompts ol { margin: .3rem 0; padding-left: 1.6rem; }
pre { overflow-x: auto; margin: .8rem 0 0; font: .82rem/1.5 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  .card { padding: .8rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile { padding: .7rem .8rem; }
  .tile b { font-size: 1.35rem; }
  th, td { padding: .35rem .3rem; font-size: .9rem; }
  .wide svg { min-width: 38rem; }
  .swipe { display: block; }
  .rows { grid-template-columns: max-content 1fr; gap: .2rem .6rem; }
  .rows > b { padding-top: .5rem; }
  .rows > .head { display: none; }
  .rows > .strip { grid-column: 1 / -1; }
  .picture, .picture img, .picture .gone { width: 3.2rem; }
  .picture img, .picture .gone { height: 3.2rem; }
  .picture figcaption { font-size: .62rem; }
  .strip { gap: .35rem; }
  .strip + .strip, .split { border: 0; padding: 0; }
}
"""
