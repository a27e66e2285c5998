"""examples/serving: what the dashboard asks for exists, and so do the options and files that the others name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.command_line import run_exl

yaml = pytest.importorskip("yaml")

FOLDER = Path(__file__).parents[2] / "examples" / "serving"
ROOT = FOLDER.parents[1]
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
_WORDS = {"by", "on", "or", "and", "unless", "group_left", "group_right", "bool", "offset", "without", "ignoring"}


@pytest.fixture(scope="module")
def told(running):
    """Names that ``/metrics`` has, each with its labels; a server on a CPU says which labels GPUs would have."""
    httpx.post(f"{running.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    text = httpx.get(f"{running.url}/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for suffix in _SUFFIXES.get(family.type, ("",)):
            found[family.name + suffix] = set()
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    found["exl_device_peak_bytes"] |= {"device"}
    return found


def dashboard() -> dict:
    return json.loads((FOLDER / "grafana/dashboards/exl.json").read_text())


def queries() -> list[str]:
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    found += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return found


def test_there_are_queries():
    assert len(queries()) > 50


@pytest.mark.parametrize("query", queries())
def test_a_query_names_metrics_and_labels_that_exist(told, query):
    names = metrics_of(query)
    assert names
    unknown = names - told.keys() - {"up"}
    assert not unknown, f"{unknown} are not in /metrics"
    labels = set().union(*(told.get(name, set()) for name in names)) | {"instance", "job"}
    assert labels_of(query) <= labels, labels_of(query) - labels


def metrics_of(query: str) -> set[str]:
    """Names that are neither functions nor words of the language nor labels."""
    bare = re.sub(r'"[^"]*"', "", query)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|on|group_left|group_right|without|ignoring) *\([^)]*\)", "", bare)
    words = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?! *\()\b", bare)
    return {word for word in words if word not in _WORDS}


def labels_of(query: str) -> set[str]:
    inside = " ".join(re.findall(r"\{([^}]*)\}", query))
    found = set(re.findall(r"(\w+) *(?:=~|!~|!=|=)", inside))
    for listed in re.findall(r"\b(?:by|on|group_left) *\(([^)]*)\)", query):
        found |= {word.strip() for word in listed.split(",")}
    return found


def test_the_reader_of_queries_finds_what_is_wrong():
    query = 'sum by (le) (rate(exl_nothing_bucket{nobody=~"$x"}[$__rate_interval])) / vector(1) or exl_more'
    assert metrics_of(query) == {"exl_nothing_bucket", "exl_more"}
    assert labels_of(query) == {"le", "nobody"}


def test_legends_and_variables_of_the_dashboard_exist(told):
    board = dashboard()
    variables = {variable["name"] for variable in board["templating"]["list"]}
    text = json.dumps(board)
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"} <= variables
    for metric, label in re.findall(r"label_values\((\w+)(?:\{[^}]*\})?, (\w+)\)", text):
        assert metric in told
        assert label in told[metric] | {"instance"}
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = set().union(*(told[name] for name in metrics_of(target["expr"])))
            assert shown <= kept, panel["title"]
            grouped = re.search(r"by \(([^)]*)\)", target["expr"])
            if grouped and target["expr"].startswith("sum by"):
                assert shown <= {word.strip() for word in grouped[1].split(",")}, panel["title"]


def test_panels_do_not_overlap():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.fixture(scope="module")
def options() -> set[str]:
    return set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", run_exl("serve", "--help").stdout, re.MULTILINE))


def test_options_that_examples_use_exist(options):
    unit = (FOLDER / "exl.service").read_text()
    (started,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    composed = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["exl"]["command"]
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    for command in (shlex.split(started), composed, json.loads(entry)):
        used = {word for word in command if word.startswith("--")}
        assert used
        assert used <= options


def test_what_ends_a_server_waits_longer_than_it_drains(options):
    unit = (FOLDER / "exl.service").read_text()
    service = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["exl"]
    drains = int(re.search(r"--drain-seconds (\d+)", unit)[1])
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > drains
    drains = int(service["command"][service["command"].index("--drain-seconds") + 1])
    assert int(service["stop_grace_period"].removesuffix("s")) > drains


def test_the_compose_file_names_what_is_there():
    composed = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    for service in composed["services"].values():
        assert {"build", "image"} & service.keys()
        if "build" not in service:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), "an image without a version"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert set(service.get("secrets", ())) <= composed["secrets"].keys()
        for volume in service["volumes"]:
            source = re.sub(r"\$\{[^}]*\}", "", volume).split(":")[0]
            assert not source.startswith("./") or (FOLDER / source).exists(), source
            assert not re.fullmatch(r"[a-z-]+", source) or source in composed["volumes"], source
    build = composed["services"]["exl"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).samefile(FOLDER / "Dockerfile")


def test_prometheus_and_grafana_find_what_they_are_told(running):
    prometheus = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert all((FOLDER / name).exists() for name in prometheus["rule_files"])
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["exl:8000"]
    assert httpx.get(running.url + job["metrics_path"]).status_code == 200
    source = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    boards = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/exl.yaml").read_text())
    current = dashboard()["templating"]["list"][0]["current"]["value"]
    assert source["datasources"][0]["uid"] == current
    mounts = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{boards['providers'][0]['options']['path']}:ro" in mounts


def test_the_image_has_what_the_package_is_built_from():
    kept = re.findall(r"^!(.*)$", (FOLDER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for name in kept)
    assert {"exl", "cuda", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= set(kept)


def test_the_dockerfile_keeps_the_usual_rules():
    text = (FOLDER / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert all(":" in stage and not stage.endswith(":latest") for stage in stages if "/" in stage or "python" in stage)
    (user,) = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert int(user) > 0
    extras = set(re.findall(r"\.\[([\w,]+)\]", text))
    known = set(re.findall(r'^        "([\w-]+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert extras
    assert all(set(each.split(",")) <= known for each in extras)
    (health,) = re.findall(r"127\.0\.0\.1:(\d+)/health", text)
    assert f'"--port", "{health}"' in text
    assert f"EXPOSE {health}" in text


def test_hadolint_finds_nothing():
    if shutil.which("hadolint") is None:
        pytest.skip("needs hadolint")
    found = subprocess.run(["hadolint", FOLDER / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_systemd_finds_nothing():
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd")
    found = subprocess.run(["systemd-analyze", "verify", FOLDER / "exl.service"], capture_output=True, text=True)
    lines = [line for line in found.stderr.splitlines() if "is not executable" not in line]  # where it is installed
    assert lines == []
