"""The report's page as a Jinja template; Python, because Flower packs no other kind of file into what it runs."""

from __future__ import annotations

STYLE = """\
:root { --ink: #1c1e21; --soft: #5a6068; --paper: #ffffff; --panel: #f5f6f7; --line: #d9dce0; --link: #0b5cad;
  --leak: #b3261e; --partial: #9a5b00; --none: #19703d; --undecided: #5a6068; --failed: #5a6068; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a4abb3; --paper: #15181b; --panel: #1f2327;
  --line: #383e45; --link: #7db4f0; --leak: #ff8a80; --partial: #f2b75c; --none: #77d49a; --undecided: #b4bac1;
  --failed: #b4bac1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 48rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.verdict { border: 1px solid var(--line); border-left: .5rem solid var(--c); background: var(--panel);
  padding: .8rem 1.1rem; margin: .9rem 0; border-radius: .3rem; }
.verdict p { margin: .15rem 0; max-width: none; }
.verdict .head { color: var(--c); font-weight: 700; font-size: 1.15rem; }
.verdict .beside { font-size: .92rem; }
.verdict .head::first-letter, .verdict .why::first-letter, .verdict .beside::first-letter { text-transform: uppercase; }
.leak { --c: var(--leak); } .partial { --c: var(--partial); } .none { --c: var(--none); }
.undecided { --c: var(--undecided); } .failed { --c: var(--failed); }
.top { font-size: 1.15rem; font-weight: 600; color: var(--c); max-width: none; }
.top::first-letter, .best::first-letter { text-transform: uppercase; }
.best { font-weight: 600; }
.badge { border: 1px solid var(--line); border-radius: .3rem; padding: 0 .4rem; font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0 1rem; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; max-width: 11rem; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.words, th.words { text-align: left; white-space: normal; }
tr.main td { font-weight: 700; }
.bar { display: inline-block; width: 9rem; height: .7rem; background: var(--line); border-radius: 2px;
  vertical-align: middle; }
.bar i { display: block; height: 100%; background: var(--link); border-radius: 2px; }
figure { margin: .8rem 0 1.4rem; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: .4rem 0 1rem; font-size: .95rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--line); padding: .7rem .9rem; border-radius: .3rem;
  overflow-x: auto; font-size: .85rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--link); }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } figure, .verdict, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll { overflow: visible; } }
"""
"""What every page looks like."""

REPORT = (
    """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
"""
    + STYLE
    + """\
</style>
</head>
<body>
<h1>{{ heading }}</h1>
<p class="soft">{{ subtitle }}</p>

{% if top %}<p class="top {{ top.level }}">{{ top.text }}</p>{% endif %}

{% for a in attacks %}
<div class="verdict {{ a.level }}">
  <p class="soft">{{ a.question }} <strong>{{ a.name }}</strong>{% if a.badge %} <span class="badge">{{ a.badge }}</span>{% endif %}</p>
  <p class="head">{{ a.headline }}</p>
  <p class="why">{{ a.explanation }}</p>
{% for line in a.beside %}
  <p class="beside">{{ line }}</p>
{% endfor %}
</div>
{% else %}
<p>No attack was part of this run.</p>
{% endfor %}
{% for note in notes %}<p class="soft">{{ note }}</p>{% endfor %}

{% if attacks %}
<h2>Results, beside what could have been guessed</h2>
{% for f in families %}
<h3>{{ f.title }}</h3>
<div class="scroll"><table>
<tr><th></th>{% for name in f.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in f.rows %}
<tr{% if row.main %} class="main"{% endif %}><td>{{ row.name }}</td>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if f.together %}<p class="best">{{ f.together }}.</p>{% endif %}
{% for remark in f.remarks if remark %}<p class="soft">{{ remark }}</p>{% endfor %}
{% endfor %}
{% endif %}

{% if canaries %}
<h2>What the noise hides: canaries</h2>
<p{% if canaries.broken %} class="top leak"{% endif %}>{{ canaries.text }}.</p>
<div class="scroll"><table>
<tr><th>epsilon</th><th>value</th><th>most that could be shown</th><th class="words">what it is</th></tr>
{% for row in canaries.rows %}
<tr><td>{{ row.name }}</td><td>{{ row.value }}</td><td>{{ row.most }}</td><td class="words">{{ row.what }}</td></tr>
{% endfor %}
</table></div>
<figure><img alt="{{ canaries.picture.alt }}" src="data:image/png;base64,{{ canaries.picture.data }}"><figcaption>{{ canaries.picture.caption }}</figcaption></figure>
{% for remark in canaries.remarks %}<p class="soft">{{ remark }}.</p>{% endfor %}
{% endif %}

{% if pictures %}
<h2>Pictures</h2>
{% for p in pictures %}
<figure><img alt="{{ p.alt }}" src="data:image/png;base64,{{ p.data }}"><figcaption>{{ p.caption }}</figcaption></figure>
{% endfor %}
{% endif %}

{% if seen %}
<h2>What the attacker saw</h2>
{% for v in seen %}
<h3>{{ v.names }}</h3>
<dl>{% for term, text in v.facts %}<dt>{{ term }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
<div class="scroll"><table>
<tr><th>tensor</th><th>sent</th><th>of</th><th>share</th><th class="words"></th></tr>
{% for layer in v.layers %}
<tr><td>{{ layer.name }}</td><td>{{ layer.kept|count }}</td><td>{{ layer.of|count }}</td><td>{{ layer.share|percent }}</td><td class="words"><span class="bar"><i style="width: {{ (layer.share * 100)|round(2) }}%"></i></span></td></tr>
{% endfor %}
</table></div>
{% endfor %}
{% endif %}

{% if federation %}
<h2>The federation</h2>
<dl>{% for term, text in federation.facts %}<dt>{{ term }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
{% for p in federation.pictures %}
<figure><img alt="{{ p.alt }}" src="data:image/png;base64,{{ p.data }}"><figcaption>{{ p.caption }}</figcaption></figure>
{% endfor %}
{% if federation.rounds %}
<div class="scroll"><table>
<tr><th>round</th>{% if federation.classifies %}<th>test accuracy</th>{% endif %}<th>{{ federation.called.loss }}</th><th>{{ federation.called.train_loss }}</th><th>answered</th><th>dropped</th><th>failed</th><th>rejected</th><th>on the wire</th><th>time</th></tr>
{% for r in federation.rounds %}
<tr><td>{{ r.round }}</td>{% if federation.classifies %}<td>{{ r.accuracy|percent }}</td>{% endif %}<td>{{ r.loss|compact }}</td><td>{{ r.train_loss|compact }}</td><td>{{ r.answered|count }}</td><td>{{ r.dropped|count }}</td><td>{{ r.failed|count }}</td><td>{{ r.rejected|count }}</td><td>{{ r.wire_bytes|size }}</td><td>{{ r.seconds|seconds }}</td></tr>
{% endfor %}
</table></div>
{% if federation.left_out %}<p class="soft">{{ federation.left_out }}</p>{% endif %}
{% endif %}
<h3>Rejected replies</h3>
{% if federation.rejections %}
<div class="scroll"><table>
<tr><th>round</th><th>client</th><th class="words">reason</th></tr>
{% for r in federation.rejections %}
<tr><td>{{ r.round }}</td><td>{{ r.client }}</td><td class="words">{{ r.reason }}</td></tr>
{% endfor %}
</table></div>
{% else %}<p>None.</p>{% endif %}
{% endif %}

<h2>How to repeat</h2>
<pre>{{ command }}</pre>
<dl>{% for term, text in versions %}<dt>{{ term }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
<details><summary>All settings (config.toml)</summary><pre>{{ config }}</pre></details>

{% if tables %}
<h2>Every figure</h2>
<p class="soft">All rows are in records.csv and records.parquet, all means and intervals in summary.json, beside this page.</p>
{% for t in tables %}
<details><summary>{{ t.title }}</summary>
<div class="scroll"><table>
<tr>{% for name in t.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in t.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div></details>
{% endfor %}
{% endif %}

<h2>How to read this page</h2>
<dl>
<dt>Floor</dt><dd>What the same attacker scores without the update{% if floors %}: {{ floors }}{% endif %}. Only what lies above the best floor is leakage.</dd>
<dt>Interval</dt><dd>95 %, over the victims, members or seeds of this run, where there are three or more. It does not cover other models, data or settings.</dd>
<dt>Undecided</dt><dd>The run could not have told leakage from none; the verdict says what would.</dd>
{% for term, text in glossary %}<dt>{{ term }}</dt><dd>{{ text }}</dd>
{% endfor %}
</dl>
</body>
</html>
"""
)

SWEEP = (
    """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>fedattack sweep</title>
<style>
"""
    + STYLE
    + """\
td.leak, td.partial, td.none { color: var(--c); font-weight: 600; }
a { color: var(--link); }
</style>
</head>
<body>
<h1>What leaks, and what protection costs</h1>
<p class="soft">{{ summary }}</p>
{% for p in pictures %}
<figure><img alt="{{ p.alt }}" src="data:image/png;base64,{{ p.data }}"><figcaption>{{ p.caption }}</figcaption></figure>
{% endfor %}
{% if seeds.rows %}
<h2>Over seeds</h2>
<div class="scroll"><table>
<tr>{% for name in seeds.columns %}<th class="words">{{ name }}</th>{% endfor %}</tr>
{% for row in seeds.rows %}
<tr>{% for cell in row.labels %}<td class="words">{{ cell }}</td>{% endfor %}{% for cell in row.figures %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="soft">Runs that differ in their seed alone, together (seeds.csv); the interval is Student's t over the seeds, the worst is what leaked most.</p>
{% endif %}
<h2>Every run</h2>
<div class="scroll"><table>
<tr>{% for name in columns %}<th class="words">{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row.labels %}<td class="words">{{ cell }}</td>{% endfor %}<td class="words {{ row.level }}">{% if row.link %}<a href="{{ row.link }}">{{ row.outcome }}</a>{% else %}{{ row.outcome }}{% endif %}</td>{% for cell in row.figures %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if reasons %}
<h2>What was not run, or failed</h2>
<dl>{% for cell, reason in reasons %}<dt>{{ cell }}</dt><dd>{{ reason }}</dd>{% endfor %}</dl>
{% endif %}
<h2>How to repeat</h2>
<pre>{{ command }}</pre>
<p class="soft">fedattack {{ version }}. The table is in cells.csv and cells.parquet, the figures are in figures, each run in its folder below cells. Intervals: 95 %, leakage over the victims of the run, accuracy over its held-out samples. The floor is the best guess without the update; only what lies above it is leakage. Epsilon is that of the worst client.</p>
</body>
</html>
"""
)
