"""The service as people try it first: curl and wget, told no more than they must be."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from tests.calls import PNG, as_png

COMMANDS = (
    "curl -s --data-binary @digit.png URL",
    "curl -s -F image=@digit.png URL",
    "curl -s -F data=@digit.png URL",
    "curl -s -H Content-Type:image/png --data-binary @digit.png URL",
    "curl -s -H Content-Type: --data-binary @digit.png URL",
    "curl -s -X POST -T digit.png URL",
    "wget -q -O - --post-file=digit.png URL",
    "wget -q -O - --post-file digit.png --header Content-Type:image/png URL",
    "wget -q -O - --method=POST --body-file=digit.png URL",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_as_people_type_it_gets_an_answer(server, client, tmp_path, command):
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is missing")
    (tmp_path / "digit.png").write_bytes(PNG)
    words = command.replace("URL", f"{server.url}/classify/fast").split()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, check=True)
    expected = as_png("/classify/fast", client).json()["predictions"]
    assert json.loads(done.stdout)["predictions"] == expected
