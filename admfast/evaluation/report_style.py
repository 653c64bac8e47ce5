"""The style sheet of a report: light, dark, narrow screens, and print on A4."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #20242b; --muted: #59616d; --line: #dfdcd4;
  --accent: #1f6f78; --soft: #e4f0ef; --warn: #8a4b08; --warn-soft: #fdf3e1; --warn-line: #d99a3d;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --card: #1d2126; --ink: #e7e9ec; --muted: #a5adb8; --line: #343a42;
    --accent: #6cc3c4; --soft: #1f3538; --warn: #f0c078; --warn-soft: #2d2417; --warn-line: #8f6a2f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", Arial, sans-serif;
}
h1, h2, h3 { line-height: 1.2; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h1 { font-size: 2rem; margin: 0 0 0.3rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 0.4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.5rem; }
p { margin: 0.3rem 0 0.9rem; max-width: 46rem; text-wrap: pretty; }
a { color: var(--accent); }
.kicker {
  color: var(--accent); font-weight: 600; font-size: 0.8rem; letter-spacing: 0.09em;
  text-transform: uppercase;
}
.lead, .note, figcaption, tfoot { color: var(--muted); }
.note { font-size: 0.875rem; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1.2rem; margin: 1.1rem 0 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
nav { margin-top: 1rem; font-size: 0.9rem; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; }
.warnings {
  margin: 1.5rem 0 0; padding: 0.9rem 1.2rem; background: var(--warn-soft);
  border: 1px solid var(--warn-line); border-left-width: 5px; border-radius: 6px; break-inside: avoid;
}
.warnings h2 { margin: 0 0 0.3rem; font-size: 1rem; color: var(--warn); }
.warnings ul { margin: 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 0.8rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.5rem 0.9rem 0.5rem 0; overflow-wrap: anywhere; }
thead th {
  overflow-wrap: normal; color: var(--muted); font-size: 0.85rem; font-weight: 600;
  border-bottom: 2px solid var(--line);
}
tbody th, tbody td { border-bottom: 1px solid var(--line); }
tbody th { font-weight: 600; min-width: 7rem; }
th small, td small { font-weight: 400; display: block; font-size: 0.82rem; color: var(--muted); }
td.number, th.number { text-align: right; white-space: nowrap; overflow-wrap: normal; }
data.value { font-size: 1.15rem; font-weight: 650; color: var(--accent); }
tr.ours > * { background: var(--soft); color: var(--ink); }
tr.ours > :first-child { padding-left: 0.6rem; border-radius: 6px 0 0 6px; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; border-radius: 3px; }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: 0.75rem; line-height: 1.3; margin-top: 0.2rem; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-weight: 600; white-space: nowrap; }
.whole { white-space: nowrap; }
.mark {
  display: inline-block; padding: 0 0.4em; border-radius: 3px; background: var(--warn-soft);
  color: var(--warn); border: 1px solid var(--warn-line); font-weight: 600; white-space: nowrap;
}
.tiles { display: grid; gap: 0.4rem; grid-template-columns: repeat(8, minmax(0, var(--tile))); }
.tiles.captions { gap: 0.8rem 0.6rem; }
.tiles figcaption b { display: block; }
.row {
  display: grid; grid-template-columns: 5rem 1fr; align-items: center; margin: 0.4rem 0;
  break-inside: avoid;
}
.row > h3 { margin: 0; font-size: 0.9rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.cards {
  display: grid; gap: 1rem; margin-top: 1rem; grid-template-columns: repeat(auto-fill, minmax(27rem, 1fr));
}
.cards.large { grid-template-columns: 1fr; }
.cards.pairs { gap: 0.5rem; grid-template-columns: repeat(auto-fill, minmax(12.5rem, 1fr)); }
.card {
  display: grid; gap: 0.35rem; padding: 0.6rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; break-inside: avoid; align-items: start;
  grid-template-columns: repeat(6, minmax(0, 1fr)); justify-content: space-between;
}
.pairs .card { grid-template-columns: 1fr 1fr; }
.card > figure:first-child img { outline: 2px solid var(--accent); }
.bars { list-style: none; margin: 0.8rem 0; padding: 0; columns: 2; column-gap: 2.5rem; }
.bars li {
  display: grid; grid-template-columns: 3.2rem 1fr 4rem; gap: 0.6rem; align-items: center; padding: 0.12rem 0;
  break-inside: avoid; font-variant-numeric: tabular-nums; font-size: 0.9rem;
}
.bars .track { order: 1; background: var(--line); border-radius: 3px; height: 0.65rem; overflow: hidden; }
.bars .track i { display: block; height: 100%; background: var(--accent); }
.bars .count { order: 2; text-align: right; }
svg.profile {
  display: block; width: 100%; height: 6rem; fill: var(--accent); background: var(--soft);
  border-radius: 4px;
}
footer { margin-top: 3.5rem; border-top: 1px solid var(--line); padding-top: 0.8rem; }
@media screen and (max-width: 42rem) {
  .scroll > table { min-width: 40rem; }
  .cards { grid-template-columns: minmax(0, 1fr); }
  .bars { columns: 1; }
  .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .row { grid-template-columns: 1fr; }
}
@page {
  size: A4; margin: 15mm 14mm 17mm;
  @bottom-right { content: counter(page) " / " counter(pages); font-size: 8pt; }
}
@media print {
  :root { color-scheme: light; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; background: #fff; font-size: 10pt; }
  h1 { font-size: 18pt; }
  h2 { font-size: 13pt; margin-top: 6mm; }
  /* An unseen block keeps what follows a heading on its page, where break-after does not. */
  h2, h3, .lead { break-inside: avoid; }
  h2::after, h3::after { content: ""; display: block; height: 62mm; margin-bottom: -62mm; }
  h3::after { height: 25mm; margin-bottom: -25mm; }
  .row > h3::after, .warnings h2::after { content: none; }
  p { orphans: 3; widows: 3; }
  nav { display: none; }
  .scroll { overflow: visible; }
  thead { display: table-header-group; }
  tr, img { break-inside: avoid; }
  data.value { font-size: 11pt; }
  /* Chromium breaks a grid within its items, but never a line of text. */
  .cards { display: block; margin-right: -2mm; }
  .cards .card { display: inline-grid; padding: 2mm; margin: 0 2mm 2mm 0; width: calc(50% - 2.2mm); }
  .cards.large .card { width: calc(100% - 2.2mm); }
  .cards.pairs .card { width: calc(25% - 2.2mm); }
  figcaption { font-size: 7pt; }
  th, td { padding-top: 1.1mm; padding-bottom: 1.1mm; }
  header { padding-bottom: 2mm; }
  .warnings { margin-top: 4mm; }
  footer { margin-top: 4mm; break-before: avoid; }
}
"""
