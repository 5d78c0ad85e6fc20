#!/usr/bin/env python3
"""monitoring.py METRICS PROMETHEUS: what scripts/grafana.json and scripts/alerts.yaml ask for is there.

METRICS is what a daemon answers to GET /metrics, PROMETHEUS the URL of a Prometheus that has scraped it.
"""

import json
import re
import subprocess
import sys

import yaml

metrics, prometheus = open(sys.argv[1]).read(), sys.argv[2]
panels = json.load(open("scripts/grafana.json"))["panels"]
rules = [rule for group in yaml.safe_load(open("scripts/alerts.yaml"))["groups"] for rule in group["rules"]]
queries = {f'{panel["title"]}: {target["expr"]}': target["expr"] for panel in panels for target in panel["targets"]}
alerts = {rule["alert"]: rule["expr"] for rule in rules}
assert len(queries) > 15 and len(alerts) > 5, (queries, alerts)

named = set(re.findall(r"tunneld_\w+", " ".join([*queries.values(), *alerts.values()])))
there = set(re.findall(r"^(tunneld_\w+)", metrics, re.MULTILINE))
assert named <= there, f"named, but not there: {sorted(named - there)}"
families = {re.sub("_(bucket|sum|count)$", "", name) for name in there}
unnamed = families - {re.sub("_(bucket|sum|count)$", "", name) for name in named}
assert not unnamed, f"there, but in no panel and no alert: {sorted(unnamed)}"
for label, value in set(re.findall(r'(end|status|result|direction)="(\w+)"', " ".join([*queries.values(), *alerts.values()]))):
    assert f'{label}="{value}"' in metrics, f"{label}={value} is in no metric"


def ask(expression):
    return subprocess.run(["promtool", "query", "instant", prometheus, expression], capture_output=True, text=True, timeout=20)


for name, query in queries.items():
    query = query.replace("$instance", ".*").replace("$__rate_interval", "20s").replace("$__range", "1h")
    answer = ask(query)
    assert answer.returncode == 0 and answer.stdout.strip(), f"{name}: {answer.stdout}{answer.stderr}"
    print(name, "->", " | ".join(answer.stdout.split("\n")))
for name, query in alerts.items():
    answer = ask(query)
    assert answer.returncode == 0, f"{name}: {answer.stderr}"
    # The left side of its comparison has values, so that it can ever be true.
    left = re.split(r" (?:==|>) ", query)[0]
    answer = ask(left)
    assert answer.stdout.strip(), f"{name}: nothing for {left}"
