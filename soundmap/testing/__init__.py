"""Fakes and contract tests that authors of plug-ins reuse."""
