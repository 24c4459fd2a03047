"""The style sheet of the report's page."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ground: #f4f5f7; --ink: #1d2026; --muted: #5f6875; --line: #e4e7eb;
  --mark: #00805f; --shade: rgb(0 0 0 / .12);
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #181b20; --ground: #101216; --ink: #e8eaed; --muted: #98a1ae; --line: #2c3138;
    --mark: #3ecf9f; --shade: rgb(0 0 0 / .5);
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere;
}
main { max-width: 56rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
h1 { font-size: 1rem; font-weight: 600; color: var(--muted); margin: 0; }
h2 { font-size: 1.12rem; line-height: 1.3; margin: 0 0 .3rem; }
.model { color: var(--muted); font-size: .92rem; margin: 0 0 .9rem; }
.headline {
  font-size: 1.75rem; font-weight: 650; line-height: 1.22; letter-spacing: -.015em;
  margin: 0 0 .7rem; text-wrap: balance;
}
.also { max-width: 46rem; margin: 0 0 .5rem; text-wrap: pretty; }
header { margin: 0 0 1.5rem; }
section, .numbers {
  background: var(--paper); border: 1px solid var(--line); border-radius: 12px; margin: 0 0 1.1rem;
}
section { padding: 1.1rem 1.2rem; }
section > p { max-width: 46rem; color: var(--muted); font-size: .92rem; margin: 0 0 .7rem; }
.numbers {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); padding: .4rem;
}
.numbers div { padding: .7rem .8rem; display: flex; flex-direction: column; }
.numbers dt { flex: 1; }
dt { color: var(--muted); font-size: .82rem; line-height: 1.3; }
.numbers dd { margin: 0; font-size: 1.45rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.numbers dd.beside { color: var(--muted); font-size: .85rem; font-weight: 400; }
.texts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: .9rem;
}
.texts figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: .92rem; margin: 0 0 .3rem; }
pre {
  margin: 0; padding: .8rem; background: var(--ground); border-radius: 8px; white-space: pre-wrap;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
.prompt { color: var(--muted); }
details details, .texts + details { margin-top: .9rem; }
summary { cursor: pointer; color: var(--muted); }
summary h2 { display: inline; color: var(--ink); }
summary span { font-size: .92rem; white-space: nowrap; }
details[open] > summary { margin-bottom: .7rem; }
.scroll {
  overflow: auto; max-height: 75vh;
  background:
    linear-gradient(to right, var(--paper) 30%, transparent) 0 / 2.5rem 100% local,
    linear-gradient(to left, var(--paper) 30%, transparent) 100% / 2.5rem 100% local,
    linear-gradient(to right, var(--shade), transparent) 0 / .7rem 100% scroll,
    linear-gradient(to left, var(--shade), transparent) 100% / .7rem 100% scroll;
  background-repeat: no-repeat;
}
table {
  border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums;
}
th {
  font-weight: 500; color: var(--muted); font-size: .82rem; line-height: 1.25;
  vertical-align: bottom; white-space: normal; min-width: 4rem;
  position: sticky; top: 0; background: var(--paper);
}
th, td { text-align: right; padding: .45rem .45rem; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:nth-child(2):last-child { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
tr:last-child td { border-bottom: 0; }
tr.ours td { font-weight: 650; color: var(--mark); }
tr.dense td { color: var(--muted); }
img { display: block; width: 100%; max-width: 46rem; height: auto; }
footer { color: var(--muted); font-size: .88rem; padding: .6rem .2rem; }
footer h2 { font-size: .95rem; color: var(--ink); margin: 1.1rem 0 .3rem; }
footer p { margin: .3rem 0; }
footer dl {
  display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; margin: 0 0 .5rem;
}
footer dt { font-size: inherit; }
footer dd { margin: 0; min-width: 0; }
footer ul { margin: 0; padding-left: 1.2rem; }
a { color: var(--mark); }
@media (max-width: 560px) {
  main { padding: 1.4rem .6rem 3rem; }
  .headline { font-size: 1.35rem; }
  section { padding: .9rem .8rem; }
  .numbers { grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); }
  .numbers dd { font-size: 1.2rem; }
  table { font-size: .82rem; }
  th { font-size: .72rem; min-width: 3.4rem; }
  th, td { padding: .42rem .35rem; }
  footer dl { grid-template-columns: 1fr; }
  footer dd { margin: 0 0 .4rem; }
}
@media print {
  body { background: none; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section, .numbers { break-inside: avoid; border-color: #cccccc; }
  img { width: auto; max-width: 100%; max-height: 17cm; margin: 0 auto; }
  details::details-content { content-visibility: visible; display: block; }
  .scroll { overflow: visible; max-height: none; background: none; }
  table { font-size: 8pt; }
  th { min-width: 0; font-size: 7pt; position: static; }
  th, td { padding: .2rem; white-space: normal; overflow-wrap: anywhere; }
}
"""
