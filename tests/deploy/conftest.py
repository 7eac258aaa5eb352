"""Under tests/deploy/run, which installs all that these tests need: what was measured is printed, and a test that is
skipped has failed.
"""

from __future__ import annotations

import os

import pytest

NOT_ASKED_FOR = ("tests/deploy/run --gpu", "tests/deploy/run --training")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "DEPLOY_WORK" in os.environ and unexpected(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "DEPLOY_WORK" in os.environ:
        for report in terminalreporter.stats.get("passed", ()):
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {value}")
        for reason in unexpected(terminalreporter.config):
            terminalreporter.write_line(f"FAILED: a check was skipped: {reason}", red=True)


def unexpected(config: pytest.Config) -> list[str]:
    """The reasons of the tests that were skipped and should not have been."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reasons = [report.longrepr[2] for report in reporter.stats.get("skipped", ())]
    return [reason for reason in reasons if not any(known in reason for known in NOT_ASKED_FOR)]
