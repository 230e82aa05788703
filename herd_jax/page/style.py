"""The style sheet of a page, for light and dark screens and for paper."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1c2330; --muted: #667085; --rule: #e2e6ec; --track: #eef1f5;
  --kept: #2f6fdb; --soft: #86aeea; --dropped: #e8743b; --loss: #b9501c; --warn: #fff4e5; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1a1f27; --ink: #e4e8ee; --muted: #94a0b2; --rule: #2c333e;
  --track: #232a34; --kept: #5a93f0; --soft: #3d5f95; --dropped: #ee8a55; --loss: #f2a078; --warn: #3a2b17; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 14px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { margin: 0 0 12px; font-size: 26px; letter-spacing: -.01em; }
h1 small { display: block; color: var(--muted); font: 13px ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
h2 { margin: 0 0 14px; font-size: 17px; }
h4 { margin: 18px 0 6px; font-size: 13px; }
code, pre { font: 12px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
section, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
section { padding: 20px 22px; margin-top: 18px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px; margin: 16px 0; }
.card { padding: 14px 16px; }
.card b { display: block; font-size: 24px; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span, .note { color: var(--muted); font-size: 12.5px; overflow-wrap: anywhere; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; }
.chip { padding: 1px 10px; border: 1px solid var(--rule); border-radius: 99px; background: var(--card); color: var(--muted);
  font-size: 12.5px; }
section > :last-child { margin-bottom: 0; }
.chip.open, .warning { background: var(--warn); color: var(--ink); }
.warning { padding: 8px 12px; border-radius: 8px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; }
nav a { color: var(--kept); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.scroll, .figure { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { padding: 4px 10px; color: var(--muted); font-weight: 500; font-size: 12.5px; text-align: left; white-space: nowrap; }
td { padding: 4px 10px; border-top: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
.pairs td:first-child { width: 34%; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.meter { min-width: 110px; height: 10px; margin-top: 6px; border-radius: 3px; background: var(--track); overflow: hidden; }
.meter div { height: 100%; border-radius: 3px; }
.meter .kept { background: var(--kept); }
.meter .dropped { background: var(--dropped); }
svg { display: block; width: 100%; height: auto; }
.figure svg { min-width: 760px; margin-bottom: 14px; }
svg text { fill: var(--ink); font-size: 12px; font-family: inherit; font-variant-numeric: tabular-nums; }
svg .name { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
svg .name, svg .number { text-anchor: end; }
svg .head, svg .tick, svg .phase, svg .faint { fill: var(--muted); }
svg .tick { font-size: 11px; }
svg .loss { fill: var(--loss); }
svg .kept { fill: var(--kept); }
svg .soft { fill: var(--soft); }
svg .dropped { fill: var(--dropped); }
svg .track { fill: var(--track); }
svg .rule { stroke: var(--rule); }
.small-figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 20px 28px; }
figure { margin: 0; }
figcaption { margin-bottom: 10px; }
details { border-top: 1px solid var(--rule); }
summary { padding: 8px 0; cursor: pointer; }
summary .note, h4 .note, figcaption .note { margin-left: 6px; font-weight: 400; }
article { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 0 16px; margin-bottom: 10px; }
article > div { min-width: 0; }
pre { max-height: 13em; margin: 4px 0 8px; padding: 10px 12px; border-radius: 8px; background: var(--track); overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.whole { max-height: none; }
@media print { body { background: none; } section, article { break-inside: avoid; } }
"""
