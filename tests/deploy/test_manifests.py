"""The Kubernetes manifests: against the schemas, and against each other. Nothing here needs a cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import textwrap
import zipfile
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="pip install '.[deploy]'")

import yaml
from carso.settings import PREFIX, Settings

from tests.deploy.manifests import (
    KSERVE_FIELDS,
    OPTIONS,
    OVERLAYS,
    Object,
    kustomized,
    objects,
    pod_specs,
    rendered,
    rendered_with,
)

ROOT = Path(__file__).parents[2]
WITH_DEPLOYMENT = [overlay for overlay in OVERLAYS if overlay != "kserve"]
# Kinds that are no part of Kubernetes, with the npm package of their types.
OPERATORS = {
    "ServiceMonitor": "prometheus-operator",
    "PrometheusRule": "prometheus-operator",
    "ScaledObject": "keda",
}
# What checkov asks for and these manifests leave open, with the reason.
LEFT_OPEN = {
    "CKV_K8S_15": "images have versions, so IfNotPresent is right",
    "CKV_K8S_21": "the namespace is the operator's: kubectl -n",
    "CKV_K8S_43": "so is the image's digest",
}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is missing")


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Object]:
    return objects(rendered(request.param))


@pytest.fixture(params=[*((name, ()) for name in WITH_DEPLOYMENT), *product(("cpu", "gpu"), OPTIONS)], ids=str)
def deployed(request: pytest.FixtureRequest, tmp_path: Path) -> list[Object]:
    """The overlays that have a Deployment, and two with options."""
    name, options = request.param
    return objects(rendered_with(name, options, tmp_path / "overlay") if options else rendered(name))


def only(found: list[Object], kind: str) -> Object:
    (it,) = (each for each in found if each["kind"] == kind)
    return it


def environment(container: Object) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def validate(found: list[Object], folder: Path) -> None:
    """Against Kubernetes' schemas, with no field that they do not have."""
    file = folder / "objects.yaml"
    file.write_text(yaml.safe_dump_all(found))
    for version in ("1.29", "1.37"):
        done = subprocess.run(
            ["kubernetes-validate", "--strict", "--no-warn", "--kubernetes-version", version, file],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"Kubernetes {version}: {done.stdout}{done.stderr}"


@pytest.mark.skipif(shutil.which("kubernetes-validate") is None, reason="pip install '.[deploy]'")
def test_kubernetes_knows_every_field(overlay: list[Object], tmp_path: Path) -> None:
    validate([each for each in overlay if each["kind"] not in {*OPERATORS, "InferenceService"}], tmp_path)


@pytest.mark.skipif(shutil.which("kubernetes-validate") is None, reason="pip install '.[deploy]'")
def test_kubernetes_knows_every_field_of_the_options(deployed: list[Object], tmp_path: Path) -> None:
    validate([each for each in deployed if each["kind"] not in OPERATORS], tmp_path)


@pytest.mark.skipif(shutil.which("kubernetes-validate") is None, reason="pip install '.[deploy]'")
def test_the_predictor_of_kserve_is_a_pod(tmp_path: Path) -> None:
    (spec,) = pod_specs(objects(rendered("kserve")))
    validate([{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "carso"}, "spec": spec}], tmp_path)


@pytest.mark.skipif("DEPLOY_WORK" not in os.environ, reason="tests/deploy/run downloads the models of KServe")
def test_kserve_knows_every_field() -> None:
    service = only(objects(rendered("kserve")), "InferenceService")
    (wheel,) = Path(os.environ["DEPLOY_WORK"]).glob("kserve-*.whl")
    models = zipfile.ZipFile(wheel)

    def fields(model: str) -> set[str]:
        source = models.read(f"kserve/models/v1beta1_{model}.py").decode()
        return set(re.findall(r"'\w+': '(\w+)'", source[source.index("attribute_map = {") :].partition("}")[0]))

    assert set(service) <= fields("inference_service")
    assert set(service["spec"]) <= fields("inference_service_spec")
    assert set(service["spec"]["predictor"]) | KSERVE_FIELDS <= fields("predictor_spec")
    assert "misspelt" not in fields("predictor_spec")


@pytest.mark.skipif("DEPLOY_WORK" not in os.environ, reason="tests/deploy/run installs the operators' types")
def test_the_operators_know_every_field() -> None:
    found = [each for each in objects(rendered("autoscaling")) if each["kind"] in OPERATORS]
    assert {each["kind"] for each in found} == set(OPERATORS)
    assert _unknown_to_their_operators(found) == ""
    for each in found:
        each["spec"]["misspelt"] = True
    assert _unknown_to_their_operators(found).count('"misspelt"') == len(found)


def _unknown_to_their_operators(found: list[Object]) -> str:
    """What TypeScript says against the resources as values of the operators' types, which know no other fields."""
    folder = Path(os.environ["DEPLOY_WORK"]) / "npm"
    lines = []
    for number, each in enumerate(found):
        kind, module = each["kind"], f"@kubernetes-models/{OPERATORS[each['kind']]}/{each['apiVersion']}/{each['kind']}"
        lines += [f'import type {{ I{kind} }} from "{module}";', f"const v{number}: I{kind} = {json.dumps(each)};"]
    (folder / "resources.mts").write_text("\n".join(lines))
    command = ["node_modules/.bin/tsc", "--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext"]
    done = subprocess.run([*command, "resources.mts"], cwd=folder, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("checkov") is None, reason="tests/deploy/run installs checkov")
@pytest.mark.parametrize("name", OVERLAYS)
def test_checkov_finds_no_gap(name: str, tmp_path: Path) -> None:
    found = [_as_checkov_knows_it(each) for each in objects(rendered(name))]
    (tmp_path / "objects.yaml").write_text(yaml.safe_dump_all(found))
    command = ["checkov", "--directory", tmp_path, "--framework", "kubernetes", "--skip-download", "--output=json"]
    done = subprocess.run([*command, "--compact"], capture_output=True, text=True)
    results = json.loads(done.stdout)["results"]
    gaps = {check["check_id"]: check["check_name"] for check in results["failed_checks"]}
    assert len(results["passed_checks"]) > 50
    assert gaps.keys() == LEFT_OPEN.keys(), gaps


def _as_checkov_knows_it(each: Object) -> Object:
    """An InferenceService as the Deployment that KServe makes of it; all else as it is."""
    if each["kind"] != "InferenceService":
        return each
    (spec,) = pod_specs([each])
    labels = each["metadata"]["labels"]
    template = {"metadata": {"labels": labels}, "spec": spec}
    deployment = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": each["metadata"], "spec": deployment}


def test_selectors_find_the_pods(deployed: list[Object]) -> None:
    deployment = only(deployed, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    spec = deployment["spec"]["template"]["spec"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        only(deployed, "Service")["spec"]["selector"],
        only(deployed, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        only(deployed, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(constraint["labelSelector"]["matchLabels"] for constraint in spec["topologySpreadConstraints"]),
    ]
    assert all(selector and selector.items() <= labels for selector in selectors)


def test_what_is_around_the_pods_of_kserve_finds_them(tmp_path: Path) -> None:
    """KServe hands the labels of an InferenceService down to its pods and its Service, and names the Service's port
    after the container's."""
    found = objects(rendered_with("kserve", ("monitoring",), tmp_path / "overlay"))
    assert not {"Deployment", "Service"} & {each["kind"] for each in found}
    service = only(found, "InferenceService")
    labels, (spec,) = service["metadata"]["labels"].items(), pod_specs([service])
    selectors = [
        only(found, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        only(found, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        only(found, "ServiceMonitor")["spec"]["selector"]["matchLabels"],
        *(constraint["labelSelector"]["matchLabels"] for constraint in spec["topologySpreadConstraints"]),
    ]
    assert len(selectors) == 4
    assert all(selector and selector.items() <= labels for selector in selectors)
    (rule,), (endpoint,) = (
        only(found, "NetworkPolicy")["spec"]["ingress"],
        only(found, "ServiceMonitor")["spec"]["endpoints"],
    )
    (port,) = spec["containers"][0]["ports"]
    assert port["name"] == endpoint["port"] == rule["ports"][0]["port"]
    assert spec["serviceAccountName"] == only(found, "ServiceAccount")["metadata"]["name"]
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external"


def test_ports_agree(deployed: list[Object]) -> None:
    (container,) = only(deployed, "Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    targets = [port["targetPort"] for port in only(deployed, "Service")["spec"]["ports"]]
    (rule,) = only(deployed, "NetworkPolicy")["spec"]["ingress"]
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    (probed,) = {probe["port"] for probe in probes}
    assert ports.pop(probed) == int(re.search(r"CARSO_PORT=(\d+)", _dockerfile())[1])
    assert sorted(targets) == sorted(allowed["port"] for allowed in rule["ports"]) == sorted([probed, *ports])
    set_to = {variable["name"]: variable.get("value") for variable in container.get("env", ())}
    assert {name: str(port) for name, port in ports.items()} in ({}, {"grpc": set_to.get("CARSO_GRPC_PORT")})
    assert [probe["path"] for probe in probes] == ["/readyz", "/readyz", "/livez"]


def test_a_pod_has_the_time_to_drain(overlay: list[Object]) -> None:
    for spec in pod_specs(overlay):
        settings = environment(spec["containers"][0])
        drain = sum(float(settings[f"CARSO_DRAIN_{part}_S"]) for part in ("DELAY", "TIMEOUT"))
        assert spec["terminationGracePeriodSeconds"] > drain + 5


def test_no_variable_of_a_service_reaches_the_settings(overlay: list[Object]) -> None:
    assert all(spec["enableServiceLinks"] is False for spec in pod_specs(overlay))


def test_every_variable_is_a_setting(deployed: list[Object]) -> None:
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    for spec in pod_specs(deployed):
        variables = set(environment(spec["containers"][0]))
        assert {name for name in variables if not name.startswith("OTEL_")} <= known  # those are OpenTelemetry's own


def test_the_restricted_pod_security_standard_is_met(overlay: list[Object], deployed: list[Object]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for spec in (*pod_specs(overlay), *pod_specs(deployed)):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all(set(volume) - {"name"} <= allowed for volume in spec.get("volumes", ()))
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] != 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True  # not in the standard
            assert not any("hostPort" in port for port in container.get("ports", ()))


def test_the_overlay_that_the_page_shows_renders(tmp_path: Path) -> None:
    page = (ROOT / "docs/deploy.md").read_text()
    shown = re.search(r"^(?:    .*\n)+", page[page.index("    apiVersion: kustomize") :], re.MULTILINE)[0]
    for folder in ("k8s", "docker"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    own = tmp_path / "k8s/overlays/own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(textwrap.dedent(shown))
    found = objects(kustomized(own))
    assert {each["metadata"]["namespace"] for each in found} == {"vision"}
    (spec,) = pod_specs(found)
    assert spec["containers"][0]["image"] == "ghcr.io/you/carso:0.1.0-gpu"
    assert "CARSO_API_KEYS_FILE" in environment(spec["containers"][0])
    assert OPERATORS.keys() <= {each["kind"] for each in found}
    triggers = only(found, "ScaledObject")["spec"]["triggers"]
    assert all('namespace="vision"' in trigger["metadata"]["query"] for trigger in triggers)
    assert triggers[0]["metadata"]["threshold"] != "12000"  # which is a processor's


def test_no_token_of_kubernetes_is_mounted(overlay: list[Object]) -> None:
    assert all(spec["automountServiceAccountToken"] is False for spec in pod_specs(overlay))


def test_every_container_has_requests_and_limits(overlay: list[Object], deployed: list[Object]) -> None:
    for spec in (*pod_specs(overlay), *pod_specs(deployed)):
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][kind])


def test_the_user_is_that_of_the_image(overlay: list[Object]) -> None:
    user, group = re.search(r"^USER (\d+):(\d+)$", _dockerfile(), re.MULTILINE).groups()
    for spec in pod_specs(overlay):
        context = spec["securityContext"]
        assert [context[name] for name in ("runAsUser", "runAsGroup")] == [int(user), int(group)]


def test_volumes_and_their_mounts_agree(deployed: list[Object]) -> None:
    for spec in pod_specs(deployed):
        containers = (*spec["containers"], *spec.get("initContainers", ()))
        mounted = {mount["name"] for container in containers for mount in container.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in spec.get("volumes", ())}


def test_api_keys_are_read_from_a_file_of_the_secret(tmp_path: Path) -> None:
    (spec,) = pod_specs(objects(rendered_with("cpu", ("api-keys",), tmp_path / "overlay")))
    (container,), (volume,) = spec["containers"], spec["volumes"]
    (mount,) = container["volumeMounts"]
    file = Path(environment(container)["CARSO_API_KEYS_FILE"])
    assert (str(file.parent), volume["secret"]["secretName"]) == (mount["mountPath"], "carso-api-keys")


def test_traces_may_leave_for_the_collector_that_the_service_is_told_of(tmp_path: Path) -> None:
    found = objects(rendered_with("monitoring", ("tracing",), tmp_path / "overlay"))
    (spec,) = pod_specs(found)
    variables = environment(spec["containers"][0])
    assert variables["CARSO_TRACING"] == "true"
    namespace, port = re.search(r"\.([a-z]+)\.svc:(\d+)$", variables["OTEL_EXPORTER_OTLP_ENDPOINT"]).groups()
    policy = only(found, "NetworkPolicy")["spec"]
    collector, names = policy["egress"]
    assert collector["to"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": namespace}
    assert [allowed["port"] for allowed in collector["ports"]] == [int(port)]
    assert {allowed["port"] for allowed in names["ports"]} == {53}
    assert len(policy["ingress"][0]["from"]) == 3  # which the monitoring component wrote


def test_the_service_has_an_address_of_each_family_that_the_cluster_has() -> None:
    assert only(objects(rendered("cpu")), "Service")["spec"]["ipFamilyPolicy"] == "PreferDualStack"
    assert re.search(r"CARSO_HOST=(\S+)", _dockerfile())[1] == "::"


def test_a_bundle_out_of_a_volume_is_mounted_where_the_service_reads_it(tmp_path: Path) -> None:
    (spec,) = pod_specs(objects(rendered_with("cpu", ("bundle-volume",), tmp_path / "overlay")))
    (container,), (volume,) = spec["containers"], spec["volumes"]
    (mount,) = container["volumeMounts"]
    assert (mount["name"], mount["readOnly"]) == (volume["name"], True)
    assert re.search(r"CARSO_BUNDLE=([^\s\\]+)", _dockerfile())[1] == mount["mountPath"]


def test_a_key_for_bundles_is_read_from_a_file_of_the_config_map(tmp_path: Path) -> None:
    (spec,) = pod_specs(objects(rendered_with("cpu", ("bundle-signature",), tmp_path / "overlay")))
    (container,), (volume,) = spec["containers"], spec["volumes"]
    (mount,) = container["volumeMounts"]
    file = Path(environment(container)["CARSO_BUNDLE_PUBLIC_KEY"])
    assert (str(file.parent), volume["configMap"]["name"]) == (mount["mountPath"], "carso-bundle-key")


def test_grpc_is_open_at_a_port_of_its_own_from_the_service_to_the_pod(tmp_path: Path) -> None:
    found = objects(rendered_with("cpu", ("grpc",), tmp_path / "overlay"))
    (container,) = next(pod_specs(found))["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": int(environment(container)["CARSO_GRPC_PORT"])}
    assert {port["targetPort"] for port in only(found, "Service")["spec"]["ports"]} == ports.keys()
    (rule,) = only(found, "NetworkPolicy")["spec"]["ingress"]
    assert {port["port"] for port in rule["ports"]} == ports.keys()


def test_a_bundle_image_fills_the_folder_that_the_service_reads(tmp_path: Path) -> None:
    (spec,) = pod_specs(objects(rendered_with("cpu", ("bundle",), tmp_path / "overlay")))
    (copier,), (container,) = spec["initContainers"], spec["containers"]
    assert copier["command"][-1] == copier["volumeMounts"][0]["mountPath"]
    assert re.search(r"CARSO_BUNDLE=([^\s\\]+)", _dockerfile())[1] == container["volumeMounts"][0]["mountPath"]


def test_a_gpu_is_asked_for_and_its_nodes_are_tolerated() -> None:
    (spec,) = pod_specs(objects(rendered("gpu")))
    resources = spec["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["containers"][0]["image"].endswith(":gpu")


def test_prometheus_of_the_cluster_and_of_compose_have_the_same_rules() -> None:
    rule = only(objects(rendered("monitoring")), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "docker/prometheus/rules.yml").read_text())
    file = ROOT / "k8s/components/monitoring/prometheus-rule.yaml"
    assert rule["spec"] == yaml.safe_load(file.read_text())["spec"], "run k8s/components/monitoring/generate"


def test_grafana_of_the_cluster_and_of_compose_have_the_same_dashboard() -> None:
    config = only(objects(rendered("monitoring")), "ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config["data"]["carso.json"] == (ROOT / "docker/grafana/dashboards/carso.json").read_text()


def test_prometheus_finds_the_service_under_the_name_that_the_rules_use() -> None:
    found = objects(rendered("monitoring"))
    monitor, service = only(found, "ServiceMonitor"), only(found, "Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= {
        port["name"] for port in service["spec"]["ports"]
    }
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "carso"  # the job of the rules
    (rule,) = only(found, "NetworkPolicy")["spec"]["ingress"]
    assert {"kubernetes.io/metadata.name": "monitoring"} in [
        peer["namespaceSelector"]["matchLabels"] for peer in rule["from"] if "namespaceSelector" in peer
    ]


def test_the_autoscaler_owns_the_number_of_replicas() -> None:
    found = objects(rendered("autoscaling"))
    deployment, scaled = only(found, "Deployment"), only(found, "ScaledObject")["spec"]
    assert "replicas" not in deployment["spec"]
    assert scaled["scaleTargetRef"] == {"name": deployment["metadata"]["name"]}
    assert 2 <= scaled["minReplicaCount"] <= scaled["fallback"]["replicas"] <= scaled["maxReplicaCount"]
    assert scaled["fallback"]["behavior"] == "currentReplicasIfHigher"
    assert {trigger["name"] for trigger in scaled["triggers"]} == {"robust", "fast"}


def _dockerfile() -> str:
    return (ROOT / "docker/Dockerfile").read_text()
