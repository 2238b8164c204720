"""The Dockerfile's steps, carried out in a fresh root; and the page that its command serves."""

import json
import os
import re
import shutil
import subprocess

import pytest
from copies import copy_tree
from dockerfile import Builder, make_base, read_dockerfile
from documented import ROOT

STAGES = read_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))
SERVE = """
ip link set lo up
chroot --userspec=1000:1000 {root} /bin/sh -c '
cd /work
python /usr/local/bin/docker-entrypoint --health && exit 10
python /usr/local/bin/docker-entrypoint {command} > /tmp/ui.log 2>&1 &
for i in $(seq 60); do sleep 1; python /usr/local/bin/docker-entrypoint --health && break; done
python /usr/local/bin/docker-entrypoint --health || {{ cat /tmp/ui.log; exit 11; }}
python -c "
import urllib.request
answer = urllib.request.urlopen(\\"http://127.0.0.1:7860/runs\\")
assert answer.url.endswith(\\"/login\\") or \\"login\\" in answer.url, answer.url
"
'
"""


def test_the_image_runs_as_nobody_special_and_has_a_health_check():
    final = {stage.name: stage for stage in STAGES}
    assert list(final)[-1] == "cuda", "the last stage is the default"
    for name in ("cpu", "cuda"):
        assert ("USER", "1000") in final[name].steps
    assert "HEALTHCHECK" in {word for word, _ in final["base"].steps}


def test_compose_and_dockerfile_agree():
    compose = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"target: (\w+)", compose)) == {"cpu", "cuda"}
    (volume,) = [rest for stage in STAGES for word, rest in stage.steps if word == "VOLUME"]
    assert f"backpropagate:{volume}" in compose
    assert "ui_auth" in (ROOT / ".gitignore").read_text(encoding="utf-8")
    assert "/run/secrets/ui_auth" in (ROOT / ".ci" / "docker-entrypoint").read_text(encoding="utf-8")


def test_what_the_image_copies_is_in_its_context():
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for stage in STAGES:
        for word, rest in stage.steps:
            for source in [part for part in rest.split()[:-1] if not part.startswith("--")] if word == "COPY" else []:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in kept, source


@pytest.mark.slow
@pytest.mark.install
def test_the_steps_make_an_image_that_serves(tmp_path):
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and debootstrap")
    context = copy_tree(tmp_path / "context", sources=True)
    # Kept across mounts: files are linked to the cache instead of copied, which saves gigabytes.
    base = make_base(tmp_path / "debian", {"SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt"})
    builder = Builder(STAGES, context, tmp_path, {"TORCH_BACKEND": ""}, base)
    builder.build("base").environment["UV_LINK_MODE"] = "symlink"
    root = builder.build("cpu")
    (root.folder / "run" / "secrets").mkdir(parents=True, exist_ok=True)
    (root.folder / "run" / "secrets" / "ui_auth").write_text("ada:a-long-enough-password\n")
    with root.mounted({"/var/cache/uv": tmp_path / "cache"}):
        assert root.run("backprop --version").stdout.split()[-1] == "2.0.0"
        assert root.run("id -u").stdout.strip() == "1000"
        script = SERVE.format(root=root.folder, command=" ".join(json.loads(_command())))
        done = subprocess.run(
            ["unshare", "-n", "-p", "-f", "--kill-child", "/bin/sh", "-c", script],
            env=root.environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"


def _command() -> str:
    (command,) = [rest for stage in STAGES for word, rest in stage.steps if word == "CMD"]
    return command
